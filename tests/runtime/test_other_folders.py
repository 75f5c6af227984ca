"""Folders as people have them, all the way: planned, exported and run as transformers runs them, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from exporter import export, verify
from planner.model.profile import build_profile
from plans.checkpoint.folder import open_checkpoint
from plans.errors import InputError, IntegrityError
from plans.export.manifest import MANIFEST_NAME
from runtime.session import load
from tests.conftest import RunCommand
from tests.exporter.export_helpers import edit_json, make_llama, make_plan

SINGLE = "model.safetensors"
IDS = torch.tensor([[1, 5, 9, 42, 7, 7, 3]])
Stored = Callable[[str], torch.dtype]

MIXES: dict[str, Stored] = {
    "norms in fp32": lambda name: torch.float32 if "norm" in name else torch.bfloat16,
    "the first in fp32": lambda name: torch.float32 if name == "lm_head.weight" else torch.bfloat16,
    "the first in bf16": lambda name: torch.bfloat16 if name == "lm_head.weight" else torch.float32,
    "the embedding in fp16": lambda name: torch.float16 if "embed" in name else torch.bfloat16,
}


def store(folder: Path, dtype_of: Stored, *, stated: str | None, key: str = "dtype") -> None:
    """Store every tensor in the dtype the function says, and state one, or none, in config.json."""
    for path in folder.glob("*.safetensors"):
        save_file({n: t.to(dtype_of(n)) for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config | ({key: stated} if stated else {})))


def unsplit(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours.dtype == theirs.dtype
    with torch.inference_mode():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.row("P1")
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("stated", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("mix", MIXES)
def test_several_stored_dtypes_run_in_the_one_transformers_takes(
    mix: str, stated: str | None, shard: str, tmp_path: Path
) -> None:
    model = make_llama(tmp_path / "model", shard=shard, num_hidden_layers=2)
    store(model, MIXES[mix], stated=stated, key="torch_dtype" if stated == "float32" else "dtype")
    reference = unsplit(model)
    plan = make_plan(model, [1, 1], devices=["cpu#0", "cpu#1"])
    assert plan.profile.dtype == {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[reference.dtype]
    export(plan, model=model, output=tmp_path / "shards")
    assert verify(tmp_path / "shards", model=model).num_tensors_compared
    assert_same(load(model), reference)
    assert_same(load(tmp_path / "shards"), reference)
    assert_same(unsplit(tmp_path / "shards"), reference)  # the export is a checkpoint of its own


@pytest.mark.row("P1")
def test_one_stored_dtype_gives_way_to_another_that_the_config_states(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", num_hidden_layers=2)
    store(model, lambda _name: torch.bfloat16, stated="float32")
    plan = make_plan(model, [2], devices=["cpu"])
    assert plan.profile.dtype == "fp32"
    export(plan, model=model, output=tmp_path / "shards")
    assert_same(load(tmp_path / "shards"), unsplit(model))


@pytest.mark.row("P1")
def test_what_the_index_says_about_the_dtype_counts_where_the_config_is_silent(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", shard="20KB", num_hidden_layers=2)
    store(model, lambda _name: torch.float32, stated=None)
    edit_json(model / "model.safetensors.index.json", metadata={"dtype": "bfloat16"})
    assert_same(load(model), unsplit(model))
    export(make_plan(model, [2], devices=["cpu"]), model=model, output=tmp_path / "shards")
    assert_same(unsplit(tmp_path / "shards"), unsplit(model))


@pytest.mark.row("P1")
def test_weights_in_float64_are_refused_until_a_dtype_is_chosen(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", num_hidden_layers=1)
    store(model, lambda _name: torch.float64, stated=None)
    with pytest.raises(InputError, match=r"lm_head\.weight, the first weight, is float64.*choose one with --dtype"):
        build_profile(open_checkpoint(model))
    assert build_profile(open_checkpoint(model), dtype="fp32").dtype == "fp32"


@pytest.mark.row("P4")
@pytest.mark.parametrize("cut", [[2], [1, 1]])
@pytest.mark.parametrize("is_copy", [False, True])
def test_a_head_beside_a_claimed_tie_runs_as_in_transformers(cut: list[int], is_copy: bool, tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", num_hidden_layers=2)
    edit_json(model / "config.json", tie_word_embeddings=True)
    if is_copy:
        tensors = load_file(model / SINGLE)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    plan = make_plan(model, cut, devices=["cpu#0", "cpu#1"][: len(cut)])
    assert plan.profile.tied is is_copy
    assert plan.profile.total_parameters == sum(p.numel() for p in unsplit(model).parameters())
    export(plan, model=model, output=tmp_path / "shards")
    assert verify(tmp_path / "shards", model=model).num_tensors_compared
    for folder in (model, tmp_path / "shards"):
        assert_same(load(folder), unsplit(model))


def quantise_head(model: Path, *, scale: str = "lm_head.weight_scale") -> None:
    """Store the head in FP8 with a scale, as several libraries do."""
    tensors = load_file(model / SINGLE)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    tensors[scale] = torch.ones(1)
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    edit_json(model / "config.json", quantization_config={"quant_method": "fp8"})


@pytest.mark.row("P6")
@pytest.mark.parametrize("cut", [[2], [1, 1]])
def test_scales_travel_with_their_head(cut: list[int], tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", num_hidden_layers=2)
    quantise_head(model)
    export(make_plan(model, cut), model=model, output=tmp_path / "shards")
    found = {name for path in (tmp_path / "shards").glob("*.safetensors") for name in load_file(path)}
    assert found == set(load_file(model / SINGLE))
    assert verify(tmp_path / "shards", model=model).num_tensors_compared == len(found)


@pytest.mark.row("P6")
def test_a_tied_table_in_fp8_takes_its_scale_to_the_head(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", num_hidden_layers=2, tie_word_embeddings=True)
    tensors = load_file(model / SINGLE)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
    tensors["model.embed_tokens.weight_scale"] = torch.ones(1)
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    edit_json(model / "config.json", quantization_config={"quant_method": "fp8"})
    export(make_plan(model, [1, 1]), model=model, output=tmp_path / "shards")
    last = load_file(tmp_path / "shards" / "model-00002-of-00002.safetensors")
    assert {"lm_head.weight", "lm_head.weight_scale"} <= set(last)
    verify(tmp_path / "shards", model=model)


@pytest.mark.row("P6")
def test_a_weight_without_its_scale_is_never_exported_nor_called_intact(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", num_hidden_layers=2)
    plain = make_llama(tmp_path / "plain", num_hidden_layers=2)
    quantise_head(model, scale="scale_elsewhere")  # left out, as older versions left out every scale of a head
    with pytest.raises(InputError, match=r"lm_head\.weight is quantised \(F8_E4M3\) and has no scale"):
        export(make_plan(model, [2]), model=model, output=tmp_path / "shards")
    # What an older version, which did not look, wrote: whole, byte for byte, and yet no model.
    edit_json(plain / "config.json", quantization_config={"quant_method": "fp8"})
    raw = load_file(model / SINGLE)
    save_file({n: t for n, t in raw.items() if n != "scale_elsewhere"}, plain / SINGLE, metadata={"format": "pt"})
    with pytest.MonkeyPatch.context() as old:
        old.setattr("plans.checkpoint.folder.check_scaled", lambda *_, **__: None)
        export(make_plan(plain, [2]), model=plain, output=tmp_path / "old")
    assert (tmp_path / "old" / MANIFEST_NAME).is_file()
    with pytest.raises(IntegrityError, match=r"lm_head\.weight is quantised \(F8_E4M3\) and its scale is not in"):
        verify(tmp_path / "old")


@pytest.mark.row("P7")
@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_part_of_a_larger_model_is_exported_as_a_model_of_its_own(prefix: str, tmp_path: Path) -> None:
    plain = make_llama(tmp_path / "plain", num_hidden_layers=2)
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((plain / "config.json").read_text())
    whole = {"model_type": "llava", "text_config": config, "dtype": config.pop("dtype")}
    (model / "config.json").write_text(json.dumps(whole))
    tensors = {name.replace("model.", prefix, 1): t for name, t in load_file(plain / SINGLE).items()}
    save_file(tensors | {"vision_tower.weight": torch.ones(4)}, model / SINGLE, metadata={"format": "pt"})
    export(make_plan(model, [1, 1], devices=["cpu#0", "cpu#1"]), model=model, output=tmp_path / "shards")
    verify(tmp_path / "shards", model=model)
    for chain in (load(model), load(tmp_path / "shards"), unsplit(tmp_path / "shards")):
        assert_same(chain, unsplit(plain))


@pytest.mark.row("P7")
def test_the_commands_say_what_a_folder_with_a_configuration_alone_is_enough_for(
    tmp_path: Path, run_command: RunCommand
) -> None:
    folder, plan = tmp_path / "model", tmp_path / "plan.json"
    folder.mkdir()
    LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=96).save_pretrained(folder)
    for command in (["analyze", folder], ["solve", folder, "--device", "cpu=8GiB", "-o", plan]):
        done = run_command("llamaplan", *command)
        assert (done.code, "by formula" in done.err) == (0, True), done.err
    missing = run_command("llamaplan", "export", plan, "--model", folder, "-o", tmp_path / "shards")
    assert (missing.code, SINGLE in missing.err) == (3, True)
    assert run_command("llamarun", "generate", folder, "-p", "x").code == 3


@pytest.mark.row("P14")
def test_check_and_bench_need_no_tokenizer(tmp_path: Path, run_command: RunCommand) -> None:
    model = make_llama(tmp_path / "model", num_hidden_layers=2)
    export(make_plan(model, [1, 1], devices=["cpu#0", "cpu#1"]), model=model, output=tmp_path / "shards")
    checked = run_command("llamarun", "check", tmp_path / "shards", "--against", model, "-n", "4")
    assert (checked.code, "random token ids" in checked.err) == (0, True), checked.err
    sizes = ("--prompt-tokens", "8", "-n", "2", "--repeats", "1", "--speed", "reference")
    measured = run_command("llamarun", "bench", tmp_path / "shards", *sizes)
    assert measured.code == 0, measured.err
    refused = run_command("llamarun", "generate", tmp_path / "shards", "-p", "x", "-n", "1")
    assert (refused.code, "no tokenizer.json" in refused.err) == (3, True)


@pytest.mark.row("P7")
def test_what_transformers_cannot_load_is_said_by_check(tmp_path: Path, run_command: RunCommand) -> None:
    model = make_llama(tmp_path / "model", num_hidden_layers=2, shard="20KB")
    (model / "model.safetensors.index.json").unlink()
    done = run_command("llamarun", "check", model, "--against", model, "-n", "2")
    assert (done.code, "transformers does not load it" in done.err) == (3, True), done.err


@pytest.mark.row("P7")
@pytest.mark.parametrize("wrap", ["base_model.model.", "_orig_mod.", "language_model."])
def test_check_never_compares_with_weights_that_transformers_makes_up(
    wrap: str, tmp_path: Path, run_command: RunCommand
) -> None:
    model = make_llama(tmp_path / "model", num_hidden_layers=2)
    tensors = load_file(model / SINGLE)
    save_file({wrap + name: tensor for name, tensor in tensors.items()}, model / SINGLE, metadata={"format": "pt"})
    done = run_command("llamarun", "check", model, "--against", model, "-n", "2")
    assert (done.code, "transformers finds no " in done.err) == (3, True), done.err


@pytest.mark.row("P7")
def test_check_names_what_transformers_refuses_in_a_larger_model(tmp_path: Path, run_command: RunCommand) -> None:
    model = make_llama(tmp_path / "model", num_hidden_layers=2)
    text = json.loads((model / "config.json").read_text())
    whole = {"model_type": "llava", "text_config": text, "vision_config": {"hidden_size": 32}}  # 32 is not 12 x N
    (model / "config.json").write_text(json.dumps(whole))
    done = run_command("llamarun", "check", model, "--against", model, "-n", "2")
    assert (done.code, "transformers does not load it" in done.err) == (3, True), done.err
