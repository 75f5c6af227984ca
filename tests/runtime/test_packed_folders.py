"""A packed checkpoint all the way: solved, exported byte for byte, run, checked, and loaded by transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_checkpoints import edit_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from exporter import export, verify
from exporter.emit import emit
from plans.checkpoint.header import read_header
from plans.errors import IntegrityError, UsageError
from plans.plan import Plan
from runtime.stages import parity
from tests.conftest import RunCommand
from tests.exporter.export_helpers import make_plan, tensor_bytes

IDS = torch.tensor([[1, 5, 9, 42, 7, 7, 3]])
CPUS = ("cpu:0", "cpu:1", "cpu:2")


@pytest.fixture(scope="module")
def packed(packed_shipped: Callable[[str], Path]) -> Path:
    """Mixed groups, a layer as it is, and a packed head of its own."""
    return packed_shipped("mixed")


@pytest.fixture(scope="module")
def plan(packed: Path) -> Plan:
    return make_plan(packed, [3, 2, 2], devices=CPUS, hosts=["here"] * 3)


@pytest.fixture(scope="module")
def shards(packed: Path, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "shards"
    export(plan, model=packed, output=folder)
    return folder


def test_an_export_holds_the_packed_tensors_byte_for_byte(packed: Path, shards: Path, plan: Plan) -> None:
    assert tensor_bytes(shards) == tensor_bytes(packed)
    assert (shards / "config.json").read_bytes() == (packed / "config.json").read_bytes()
    assert verify(shards, model=packed).num_tensors_compared == len(load_file(packed / "model.safetensors"))
    with pytest.raises(UsageError, match="quantised"):
        export(plan, model=packed, output=shards.parent / "no", dtype="fp32")


def test_the_plan_counts_the_bytes_of_the_bundles(shards: Path, plan: Plan) -> None:
    for bundle, stage in zip(sorted(shards.glob("*.safetensors")), plan.stages, strict=True):
        assert stage.weight_bytes == sum(entry.size_bytes for entry in read_header(bundle).tensors.values())


def test_an_export_is_a_folder_that_transformers_loads(packed: Path, shards: Path) -> None:
    with torch.inference_mode():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(f).eval()(IDS).logits for f in (shards, packed))
    assert torch.equal(ours, theirs)


def test_check_finds_an_export_equal_to_transformers_with_compressed_tensors(
    packed: Path, shards: Path, run_command: RunCommand
) -> None:
    found = run_command("llamarun", "check", shards, "--against", packed, "-n", "8", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["is_identical"] is True
    assert "it/s" not in found.err


def test_check_says_what_to_install_where_transformers_cannot_unpack(
    packed: Path, shards: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "find_spec", lambda _name: None)
    found = run_command("llamarun", "check", shards, "--against", packed, "-n", "8")
    assert found.code == 6
    assert "pip install compressed-tensors" in found.err


def test_several_processes_write_what_one_writes(shards: Path, run_command: RunCommand) -> None:
    options = [
        "generate",
        shards,
        "-p",
        "def main(",
        "-n",
        "12",
        "--temperature",
        "0",
        "--json",
        "--speed",
        "reference",
    ]
    one = run_command("llamarun", *options)
    several = run_command("llamarun", *options, "--processes")
    assert (one.code, several.code) == (0, 0), one.err + several.err
    assert _texts(one.out) == _texts(several.out) != []


def _texts(out: str) -> list[object]:
    return [sequence["token_ids"] for sequence in json.loads(out)["sequences"]]


def test_a_plan_for_packed_weights_can_be_started_with_torchrun(plan: Plan) -> None:
    assert emit(plan, engine="torchrun").files


def test_verify_names_a_scale_that_the_configuration_does_not_know(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    path = copy / "model-00003-of-00003.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["lm_head.weight_scale"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(IntegrityError):
        verify(copy)


@pytest.mark.row("P22")
@pytest.mark.parametrize("command", ["analyze", "generate"])
def test_a_checkpoint_without_a_scale_ends_with_the_tensors_name(
    command: str, packed: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.4.mlp.up_proj.weight_scale"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    options = {"analyze": ["llamaplan", "analyze", copy], "generate": ["llamarun", "generate", copy, "-p", "x"]}
    found = run_command(*options[command])
    assert found.code == 3
    assert "no model.layers.4.mlp.up_proj.weight_scale" in found.err


@pytest.mark.row("P22")
def test_nan_scales_end_a_run_with_the_tensors_name(packed: Path, run_command: RunCommand, tmp_path: Path) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight_scale"][7, 1] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    found = run_command("llamarun", "generate", copy, "-p", "x", "-n", "1")
    assert found.code == 3
    assert "lm_head.weight_scale holds nan in row 7, group 1" in found.err


@pytest.mark.parametrize(
    ("change", "key"),
    [({"format": "marlin-24"}, "format"), ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme")],
)
def test_an_unknown_scheme_ends_a_run_with_the_key(
    change: dict[str, object], key: str, packed: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    table = json.loads((copy / "config.json").read_text())["quantization_config"]
    edit_config(copy, quantization_config=table | change)
    found = run_command("llamarun", "generate", copy, "-p", "x", "-n", "1")
    assert found.code == 3
    assert f"/quantization_config/{key}" in found.err
