"""Models with routed experts: packed ones are sized, cut, packed, run and compared with transformers."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import SchemeOf, edit_config, pack_checkpoint
from parity import CPU, all_cuts, assert_same, model_step, save_model, some_cut, stages_step, trace
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from exporter import export, verify
from planner.model.profile import build_profile
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.header import read_header
from plans.errors import InputError
from plans.packed.scheme import INT4, INT8, Scheme, is_linear
from runtime import load
from runtime.fast.native import Library
from runtime.reading.families import parse_model_config
from runtime.reading.tensors import FolderTensors, torch_dtype
from runtime.stages.loading import set_speed
from runtime.stages.parity import load_unsplit
from runtime.stages.stage import build_stage
from tests.conftest import SHIPPED, Finished, RunCommand
from tests.exporter.export_helpers import make_plan, tensor_bytes
from tests.exporter.packing_helpers import packed_plan

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


def dequantised(folder: Path, target: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a copy with plain weights: number times scale, both in one dtype, rounded once."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights = {name: tensor for name, tensor in stored.items() if ".weight_" not in name}
    for module in [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]:
        words = stored[f"{module}.weight_packed"].long() & 0xFFFFFFFF
        bits = 32 * words.shape[1] // int(stored[f"{module}.weight_shape"][1])
        numbers = (words[..., None] >> torch.arange(0, 32, bits) & 2**bits - 1) - 2 ** (bits - 1)
        grouped = numbers.flatten(1).unflatten(1, (-1, 32)).to(dtype)
        weights[f"{module}.weight"] = (grouped * stored[f"{module}.weight_scale"].to(dtype)[..., None]).flatten(1)
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
    expected = logits(dequantised(model, tmp_path / "plain"))
    assert torch.equal(logits(tmp_path / "shards"), expected)


# --- what is run ------------------------------------------------------------------------------------------------------

PER_ROW, WIDE = Scheme(8, None), Scheme(4, 64)
KINDS: dict[str, SchemeOf] = {
    "all in int4": lambda module: None if module == "lm_head" else INT4,
    "all in int8": lambda module: None if module == "lm_head" else INT8,
    "one scale per row": lambda module: None if module == "lm_head" else PER_ROW,
    "int4, attention in groups of 64, head in int8": (
        lambda module: INT8 if module == "lm_head" else WIDE if ".self_attn." in module else INT4
    ),
    "experts alone": lambda module: INT4 if ".experts." in module else None,
}
UNLIKE_TRANSFORMERS: dict[str, SchemeOf] = {
    "attention alone": lambda module: INT8 if ".self_attn." in module else None,
    "layers of other widths": lambda module: None if module == "lm_head" else INT4 if ".layers.1." in module else INT8,
    "down projections as they are": lambda m: None if m == "lm_head" or m.endswith(("down_proj", ".w2")) else INT4,
}


def pack_as(source: Path, target: Path, scheme_of: SchemeOf, *, scale_dtype: torch.dtype | None = None) -> Path:
    """Pack what is linear, and let `ignore` name what is not packed by its file's names."""

    def linear(module: str) -> Scheme | None:
        return scheme_of(module) if is_linear(module) else None

    pack_checkpoint(source, target, scheme_of=linear, scale_dtype=scale_dtype)
    table = json.loads((target / "config.json").read_text())["quantization_config"]
    plain = [n.removesuffix(".weight") for n in load_file(target / "model.safetensors") if n.endswith(".weight")]
    edit_config(target, quantization_config=table | {"ignore": [n for n in plain if is_linear(n)]})
    return target


def assert_every_cut_gives(expected: list[torch.Tensor], folder: Path, *, dtype: str = "bf16") -> None:
    """Stages that know nothing of each other, for every cut in two and one in three; and a chain."""
    checkpoint = open_checkpoint(folder)
    config, tensors = parse_model_config(checkpoint.config.raw), FolderTensors(checkpoint)
    cuts = [*all_cuts(NUM_LAYERS, 2), some_cut(NUM_LAYERS, 3, seed=2)]
    for cut in cuts:
        stages = [build_stage(config, spec, tensors, dtype=torch_dtype(dtype), device=CPU) for spec in cut]
        assert_same(expected, trace(stages_step(stages), vocab_size=2048, num_tokens=4))
    together = load(folder, stages=cuts[-1], dtype=dtype)
    assert_same(expected, trace(model_step(together), vocab_size=2048, num_tokens=4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_cut_of_packed_experts_equals_transformers_bit_for_bit(
    family: str, kind: str, plain: Make, tmp_path: Path
) -> None:
    folder = pack_as(plain(family), tmp_path / "packed", KINDS[kind])
    expected = trace(model_step(load_unsplit(folder, dtype=torch.bfloat16)), vocab_size=2048, num_tokens=4)
    assert_every_cut_gives(expected, folder)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_computed_in_the_dtype_of_their_scales_as_in_transformers(
    family: str, scale: torch.dtype, dtype: str, plain: Make, tmp_path: Path
) -> None:
    folder = pack_as(plain(family), tmp_path / "packed", KINDS["all in int4"], scale_dtype=scale)
    expected = trace(model_step(load_unsplit(folder, dtype=torch_dtype(dtype))), vocab_size=2048, num_tokens=4)
    assert_every_cut_gives(expected, folder, dtype=dtype)


@pytest.mark.parametrize("kind", UNLIKE_TRANSFORMERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_does_not_unpack_is_its_numbers_times_scales_and_check_refuses_it(
    family: str, kind: str, plain: Make, run_command: RunCommand, tmp_path: Path
) -> None:
    folder = pack_as(plain(family), tmp_path / "packed", UNLIKE_TRANSFORMERS[kind])
    original = AutoModelForCausalLM.from_pretrained(dequantised(folder, tmp_path / "plain"), dtype=torch.bfloat16)
    assert_every_cut_gives(trace(model_step(original.eval()), vocab_size=2048, num_tokens=4), folder)
    found = run_command("llamarun", "check", folder, "--against", folder, "-n", 1)
    words = {"layers of other widths": "every expert as int4 g32, and they are int4 g32 and int8 g32"}
    assert_refused(found, code=3, words=words.get(kind, "transformers"))


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_of_packed_experts_are_checked_generated_from_and_never_unpacked(
    family: str, packed: Pack, run_command: RunCommand, tmp_path: Path
) -> None:
    model, shards = packed(family, "int4"), tmp_path / "shards"
    export(make_plan(model, [1, 2], devices=["cpu:0", "cpu:1"], hosts=["here"] * 2), model=model, output=shards)
    checked = run_command("llamarun", "check", shards, "--against", model, "-n", 8, "--json")
    assert (checked.code, json.loads(checked.out)["is_identical"]) == (0, True), checked.err
    words = ["generate", shards, "-p", "def main(", "-n", 8, "--temperature", 0, "--json", "--speed", "reference"]
    one, several = (run_command("llamarun", *words, *more) for more in ([], ["--processes"]))
    assert (one.code, several.code) == (0, 0), one.err + several.err
    tokens = [[s["token_ids"] for s in json.loads(run.out)["sequences"]] for run in (one, several)]
    assert tokens[0] == tokens[1] != []
    chain = load(shards)
    chain(IDS)
    assert sum(weight.nbytes for weight in chain.parameters()) == sum(map(len, tensor_bytes(model).values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_are_multiplied_natively_where_kernels_are(
    family: str, plain: Make, kernels: Library, tmp_path: Path
) -> None:
    folder = pack_as(plain(family), tmp_path / "packed", KINDS["all in int4"], scale_dtype=torch.float32)
    chain = load(folder, dtype="fp32")
    with torch.inference_mode():
        expected = chain(IDS).logits
        set_speed(chain, "max")
        assert f"no native kernel for {family}" in str(chain.reason)
        experts = [layer for name, layer in chain.named_modules() if ".experts." in name and hasattr(layer, "product")]
        assert len(experts) == NUM_LAYERS * NUM_EXPERTS * 3
        assert all(layer.product is not None for layer in experts)
        assert (chain(IDS).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_another_way_to_compute_packed_experts_is_refused(packed: Pack, tmp_path: Path) -> None:
    folder = shutil.copytree(packed("qwen3_moe", "int4"), tmp_path / "eager")
    edit_config(folder, experts_implementation="eager")
    with pytest.raises(
        InputError, match=r"experts_implementation: is eager, and packed experts are computed in one way"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("weight_scale", "no model.layers.1.block_sparse_moe.experts.2.w3.weight_scale"),
        ("weight_packed", "is there, and no"),
    ],
)
def test_an_expert_without_a_part_ends_with_the_tensors_name(
    part: str, words: str, packed: Pack, run_command: RunCommand, tmp_path: Path
) -> None:
    folder = shutil.copytree(packed("mixtral", "int4"), tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.1.block_sparse_moe.experts.2.w3.{part}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(run_command("llamarun", "generate", folder, "-p", "x", "-n", 1), code=3, words=words)


# --- what is packed here ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_packed_by_export_are_sized_to_the_byte_and_run_as_transformers_loads_them(
    family: str, width: str, plain: Make, run_command: RunCommand, tmp_path: Path
) -> None:
    model, shards = plain(family), tmp_path / "shards"
    plan = packed_plan(model, [1, 2], bits=WIDTHS[width].bits, head_bits=8, devices=["cpu:0", "cpu:1"])
    export(plan, model=model, output=shards)
    stored = tensor_bytes(shards)
    for bundle, stage in zip(sorted(shards.glob("*.safetensors")), plan.stages, strict=True):
        assert stage.weight_bytes == sum(entry.size_bytes for entry in read_header(bundle).tensors.values())
    solved = run_command("llamaplan", "solve", model, "--device", "cpu=1GiB", "--weights", width, "--json")
    assert json.loads(solved.out)["profile"]["total_weight_bytes"] == sum(map(len, stored.values()))
    matrices = [name.removesuffix(".weight") for name in tensor_bytes(model) if is_linear(name.removesuffix(".weight"))]
    assert {f"{module}.weight_packed" for module in matrices} == {n for n in stored if n.endswith(".weight_packed")}
    routers = [name for name in stored if name.endswith(".gate.weight")]
    assert [stored[name] for name in routers] == [tensor_bytes(model)[name] for name in routers] != []
    assert verify(shards, model=model).num_tensors_compared == len(stored)
    assert torch.equal(logits(shards), logits(dequantised(shards, tmp_path / "plain")))
    expected = trace(model_step(load_unsplit(shards, dtype=torch.bfloat16)), vocab_size=2048, num_tokens=4)
    assert_every_cut_gives(expected, shards)


def test_the_distance_of_packed_experts_to_their_original_is_told(
    plain: Make, run_command: RunCommand, tmp_path: Path
) -> None:
    """In fp32, the experts too: the distance is that of the weights, and none where these are the same."""
    model, distances = plain("qwen3_moe"), dict[str, float]()
    for name, scheme in WIDTHS.items():
        export(packed_plan(model, [3], bits=scheme.bits, devices=["cpu"]), model=model, output=tmp_path / name)
    same = dequantised(tmp_path / "int4", tmp_path / "same", dtype=torch.float32)
    for name, shards, original in (("int4", "int4", model), ("int8", "int8", model), ("same", "int4", same)):
        found = run_command("llamarun", "check", tmp_path / shards, "--against", original, "-n", 4, "--json")
        assert found.code == 0, found.err
        distances[name] = json.loads(found.out)["mean_kl"]
    assert distances["int4"] > 4 * distances["int8"] > 0
    assert distances["same"] < 1e-4 * distances["int4"]


@pytest.mark.parametrize("command", ["analyze", "compare", "frontier"])
def test_every_command_plans_packed_experts(command: str, plain: Make, run_command: RunCommand) -> None:
    devices = [] if command == "analyze" else ["--device", "cpu=1GiB"]
    found = run_command("llamaplan", command, plain("qwen3_moe"), *devices, "--weights", "int4")
    assert found.code == 0, found.err


def test_the_widest_width_that_fits_is_chosen_for_experts(plain: Make, run_command: RunCommand, tmp_path: Path) -> None:
    def solved(memory: str, *options: str) -> dict[str, Any]:
        command = ["solve", plain("mixtral"), "--device", f"cpu={memory}", *options, "-o", tmp_path / "plan.json"]
        assert run_command("llamaplan", *command).code == 0
        document: dict[str, Any] = json.loads((tmp_path / "plan.json").read_text())
        return document

    (stage,) = solved("1GiB")["stages"]
    needed = sum(stage[f"{part}_bytes"] for part in ("weight", "kv_cache", "activation", "overhead"))
    assert "weights" not in solved(f"{needed // 1024 + 1}KiB", "--weights", "auto")
    assert solved(f"{needed // 1024 - 1}KiB", "--weights", "auto")["weights"]["kind"] == "int8"


def test_sensitivities_and_calibration_of_experts_are_refused_with_the_reason(
    plain: Make, run_command: RunCommand, tmp_path: Path
) -> None:
    found = run_command("llamaplan", "sensitivity", plain("mixtral"), "--text", __file__)
    assert_refused(found, code=2, words="transformers reads the experts of all layers in one width")
    plan = tmp_path / "plan.json"
    plan.write_text(packed_plan(plain("mixtral"), [3]).to_json())
    found = run_command(
        "llamaplan", "export", plan, "--model", plain("mixtral"), "-o", tmp_path / "no", "--calibration-text", __file__
    )
    assert_refused(found, code=2, words="experts are rounded to nearest alone")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_one_tensor_are_run_and_not_packed(
    family: str, plain: Make, run_command: RunCommand, tmp_path: Path
) -> None:
    """As transformers holds them: `experts.gate_up_proj` [experts, 2 x inner, hidden]."""
    folder = tmp_path / "together"
    shutil.copytree(plain(family), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = AutoModelForCausalLM.from_pretrained(plain(family), dtype=torch.bfloat16).state_dict()
    assert {t.dim() for name, t in weights.items() if name.endswith("experts.gate_up_proj")} == {3}
    save_file({name: t.contiguous() for name, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert build_profile(open_checkpoint(folder)).total_weight_bytes == sum(t.nbytes for t in weights.values())
    found = run_command("llamaplan", "solve", folder, "--device", "cpu=1GiB", "--weights", "int4")
    assert_refused(found, code=2, words="the experts of a layer lie in one tensor")
    assert torch.equal(load(folder)(IDS).logits, logits(plain(family)))
