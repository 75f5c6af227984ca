"""Models with routed experts: packed ones are sized, cut and loaded by transformers; packing and running is refused."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import edit_config, pack_checkpoint
from parity import save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from exporter import export, verify
from planner.model.profile import build_profile
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.header import read_header
from plans.errors import InputError
from plans.packed.scheme import INT4, INT8, Scheme
from runtime import load
from tests.conftest import SHIPPED, Finished, RunCommand
from tests.exporter.export_helpers import make_plan, tensor_bytes

NUM_LAYERS, NUM_EXPERTS = 3, 4
COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": 128, "pad_token_id": 0,
    "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**COMMON, num_local_experts=NUM_EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(**COMMON, num_experts=NUM_EXPERTS, head_dim=16, moe_intermediate_size=32),
}
WIDTHS = {"int4": INT4, "int8": INT8}
REFUSED = {
    "mixtral": "those of 4 experts, which are not packed",
    "qwen3_moe": "llamarun does not run model_type qwen3_moe",
}
IDS = torch.tensor([[1, 5, 9, 42, 7, 7, 3]])

Make = Callable[[str], Path]
Pack = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A random model of a family in bf16, with the shipped tokenizer."""

    @cache
    def make(family: str) -> Path:
        folder = save_model(FAMILIES[family], tmp_path_factory.mktemp("experts") / family, dtype=torch.bfloat16)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(SHIPPED / name, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def packed(plain: Make, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """The same with every matrix of its layers packed, experts and all; only the router stays."""

    @cache
    def make(family: str, width: str) -> Path:
        def scheme_of(module: str) -> Scheme | None:
            return WIDTHS[width] if ".experts." in module or module.endswith("_proj") else None

        return pack_checkpoint(plain(family), tmp_path_factory.mktemp("packed") / family, scheme_of=scheme_of)

    return make


@pytest.fixture(scope="module")
def attention_packed(plain: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral whose experts are left as they are."""
    folder = tmp_path_factory.mktemp("packed") / "attention"
    pack_checkpoint(plain("mixtral"), folder, scheme_of=lambda module: INT8 if module.endswith("_proj") else None)
    table = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config=table | {"ignore": [*table["ignore"], "re:.*experts.*"]})
    return folder


def dequantised(folder: Path, target: Path, *, scheme: Scheme) -> Path:
    """Write a copy with plain weights: number times scale, both in bf16, rounded once."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    stored = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in stored.items() if ".weight_" not in name}
    shifts = torch.arange(0, 32, scheme.bits)
    for module in [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]:
        words = stored[f"{module}.weight_packed"].long() & 0xFFFFFFFF
        numbers = (words[..., None] >> shifts & 2**scheme.bits - 1) - 2 ** (scheme.bits - 1)
        grouped = numbers.flatten(1).unflatten(1, (-1, 32)).bfloat16()
        weights[f"{module}.weight"] = (grouped * stored[f"{module}.weight_scale"][..., None]).flatten(1)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def assert_refused(found: Finished, *, code: int, words: str) -> None:
    assert found.code == code, found.err
    assert words in found.err


# --- what is packed already -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_are_sized_and_cut_to_the_byte(family: str, width: str, packed: Pack, tmp_path: Path) -> None:
    model = packed(family, width)
    stored = {name: len(data) for name, data in tensor_bytes(model).items()}
    profile = build_profile(open_checkpoint(model))
    assert profile.total_weight_bytes == sum(stored.values())
    experts = sum(size for name, size in stored.items() if name.startswith("model.layers.1.") and ".experts." in name)
    first = profile.layers[1]
    assert first.weight_bytes - first.decode_read_bytes == experts // 2  # two of four
    plan = make_plan(model, [1, 2], devices=["cpu#0", "cpu#1"])
    export(plan, model=model, output=tmp_path / "shards")
    assert tensor_bytes(tmp_path / "shards") == tensor_bytes(model)
    for bundle, stage in zip(sorted((tmp_path / "shards").glob("*.safetensors")), plan.stages, strict=True):
        assert stage.weight_bytes == sum(entry.size_bytes for entry in read_header(bundle).tensors.values())
    assert verify(tmp_path / "shards", model=model).num_tensors_compared == len(stored)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_cut_experts_with_the_logits_of_their_numbers_times_scales(
    family: str, width: str, packed: Pack, tmp_path: Path
) -> None:
    model = packed(family, width)
    export(make_plan(model, [1, 2], devices=["cpu#0", "cpu#1"]), model=model, output=tmp_path / "shards")
    expected = logits(dequantised(model, tmp_path / "plain", scheme=WIDTHS[width]))
    assert torch.equal(logits(tmp_path / "shards"), expected)


@pytest.mark.parametrize("command", ["generate", "batch", "bench", "check"])
def test_running_packed_experts_is_refused_with_the_reason(
    command: str, packed: Pack, run_command: RunCommand, tmp_path: Path
) -> None:
    model, prompts = packed("mixtral", "int4"), tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "x"}\n')
    options = {
        "generate": ["-p", "x", "-n", 1],
        "batch": [prompts, "-o", tmp_path / "out.jsonl"],
        "bench": [],
        "check": ["--against", model],
    }
    found = run_command("llamarun", command, model, *options[command])
    assert_refused(found, code=3, words="int4 g32 weights of a model with 4 experts are not run")
    assert "--for vllm" in found.err


def test_running_is_refused_where_only_the_attention_is_packed(
    attention_packed: Path, plain: Make, run_command: RunCommand
) -> None:
    """transformers does not load such a thing either, so that nothing could be compared with what would come out."""
    with pytest.raises(InputError, match="int8 g32 weights of a model with 4 experts"):
        load(attention_packed)
    found = run_command("llamarun", "check", plain("mixtral"), "--against", attention_packed, "-n", 1)
    assert_refused(found, code=3, words="transformers does not load it")


def test_a_family_that_is_not_run_is_named(packed: Pack, run_command: RunCommand) -> None:
    found = run_command("llamarun", "generate", packed("qwen3_moe", "int4"), "-p", "x", "-n", 1)
    assert_refused(found, code=3, words="model_type qwen3_moe is not supported")


# --- what would have to be packed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["analyze", "--weights", "int4"],
        *(["solve", "--device", "cpu=1GiB", "--weights", weights] for weights in ("int4", "int8", "auto")),
        ["compare", "--device", "cpu=1GiB", "--weights", "int8"],
        ["frontier", "--device", "cpu=1GiB", "--weights", "int8"],
        ["devices", "--measure", "--weights", "auto"],
        ["sensitivity", "--text", __file__],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_bits_for_experts_are_refused_with_the_reason(
    family: str, command: list[str], plain: Make, run_command: RunCommand
) -> None:
    name, *options = command
    assert_refused(run_command("llamaplan", name, plain(family), *options), code=2, words=REFUSED[family])


def test_experts_in_one_tensor_are_refused_alike(plain: Make, run_command: RunCommand, tmp_path: Path) -> None:
    """As transformers holds them: `experts.gate_up_proj` [experts, 2 x inner, hidden]."""
    folder = tmp_path / "together"
    shutil.copytree(plain("qwen3_moe"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = AutoModelForCausalLM.from_pretrained(plain("qwen3_moe"), dtype=torch.bfloat16).state_dict()
    assert {t.dim() for name, t in weights.items() if name.endswith("experts.gate_up_proj")} == {3}
    save_file({name: t.contiguous() for name, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert build_profile(open_checkpoint(folder)).total_weight_bytes == sum(t.nbytes for t in weights.values())
    found = run_command("llamaplan", "solve", folder, "--device", "cpu=1GiB", "--weights", "int4")
    assert_refused(found, code=2, words=REFUSED["qwen3_moe"])
