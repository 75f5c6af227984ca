"""How packed weights are described, against compressed-tensors' own reading of the same configuration."""

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from torch import nn

from plans.errors import InputError
from plans.packed.choice import WeightChoice
from plans.packed.config import quantization_config, read_packing
from plans.packed.patterns import MAX_WAYS, ways
from plans.packed.scheme import INT4, INT8, Scheme

LINEARS = [f"layers.{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
MODULES = [*(f"model.{name}" for name in LINEARS), "lm_head"]


def group(targets: list[str], **weights: Any) -> dict[str, Any]:
    usual = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    return {"targets": targets, "format": "pack-quantized", "weights": usual | weights}


def config(*groups: dict[str, Any], ignore: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": value for i, value in enumerate(groups)},
        "ignore": list(ignore),
    } | more


def ours(table: dict[str, Any]) -> dict[str, Scheme | None]:
    packing = read_packing({"quantization_config": table})
    assert packing is not None
    return {module: packing.scheme_of(module) for module in MODULES}


def theirs(table: dict[str, Any]) -> dict[str, Scheme | None]:
    model = nn.Module()
    for module in MODULES:
        parent: nn.Module = model
        *path, leaf = module.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, nn.Linear(128, 128, device="meta", dtype=torch.bfloat16))
    apply_quantization_config(model, QuantizationConfig.model_validate(table), show_progress=False)
    found = {module: getattr(model.get_submodule(module), "quantization_scheme", None) for module in MODULES}
    return {
        module: scheme and Scheme(scheme.weights.num_bits, scheme.weights.group_size)
        for module, scheme in found.items()
    }


MATCHES = {
    "one group for all": config(group(["Linear"]), ignore=("lm_head",)),
    "a head with the rest": config(group(["Linear"], num_bits=8)),
    "an exact name wins over a pattern": config(group(["re:.*q_proj"]), group([MODULES[0]], num_bits=8)),
    "a pattern wins over the class": config(group(["Linear"]), group(["re:.*up_proj$"], group_size=64)),
    "patterns are tried in the order of their texts": config(
        group(["re:model.*q_proj", "re:.*mlp.*"], num_bits=8), group(["re:.*mlp[.]up.*", "re:.*self_attn.*"])
    ),
    "of equal targets the last counts": config(group(["Linear"]), group(["Linear"], num_bits=8)),
    "a pattern is ignored": config(group(["Linear"]), ignore=("re:.*layers[.][02][.]", "lm_head")),
    "the class is ignored": config(group(["re:.*"]), ignore=("Linear",)),
    "one text is target and ignored": config(group(["re:.*up_proj", "Linear"]), ignore=("re:.*up_proj",)),
    "a scale per row": config(group(["Linear"], strategy="channel", group_size=None)),
}


@pytest.mark.parametrize("table", MATCHES.values(), ids=MATCHES)
def test_a_layer_gets_the_scheme_that_compressed_tensors_gives_it(table: dict[str, Any]) -> None:
    assert ours(table) == theirs(table)


@pytest.mark.parametrize("bits", [(4, 4, 4), (8, 8, 8), (4, 8, 4)])
def test_what_is_written_is_read_again_here_and_there(bits: tuple[int, ...]) -> None:
    schemes = {module: INT4 if bits[int(module.split(".")[2])] == 4 else INT8 for module in MODULES[:-1]}
    written = quantization_config(schemes)
    assert ours(written) == theirs(written) == schemes | {"lm_head": None}


REFUSED = {
    "quant_method": config(group(["Linear"]), quant_method="gptq"),
    "format": config(group(["Linear"]), format="int-quantized"),
    "config_groups/group_0/format": config(group(["Linear"]) | {"format": None}, format="mixed-precision"),
    "quantization_status": config(group(["Linear"]), quantization_status="frozen"),
    "kv_cache_scheme": config(group(["Linear"]), kv_cache_scheme={"num_bits": 8}),
    "transform_config": config(group(["Linear"]), transform_config={"config_groups": {}}),
    "config_groups": config(),
    "config_groups/group_0": config(group(["Linear"]), config_groups={"group_0": ["Linear"]}),
    "config_groups/group_0/targets": config(group([1])),  # type: ignore[list-item]
    "config_groups/group_0/input_activations": config(group(["Linear"]) | {"input_activations": {"num_bits": 8}}),
    "config_groups/group_0/weights": config(group(["Linear"]) | {"weights": None}),
    "config_groups/group_0/weights/num_bits": config(group(["Linear"], num_bits=3)),
    "config_groups/group_0/weights/type": config(group(["Linear"], type="float")),
    "config_groups/group_0/weights/symmetric": config(group(["Linear"], symmetric=False)),
    "config_groups/group_0/weights/dynamic": config(group(["Linear"], dynamic=True)),
    "config_groups/group_0/weights/actorder": config(group(["Linear"], actorder="group")),
    "config_groups/group_0/weights/strategy": config(group(["Linear"], strategy="tensor", group_size=None)),
    "config_groups/group_0/weights/group_size": config(group(["Linear"], group_size=48)),
    "config_groups/group_0/weights/block_structure": config(group(["Linear"], block_structure=[128, 128])),
    "ignore": config(group(["Linear"]), ignore=("re:(a+)+$",)),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_understood_is_refused_by_its_key(key: str) -> None:
    with pytest.raises(InputError) as caught:
        read_packing({"quantization_config": REFUSED[key]})
    assert caught.value.code == "E-QUANT"
    assert caught.value.where == f"config.json:/quantization_config/{key}"


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|b)*", "(?:a{2,9}){2,9}", ".*.*.*.*.*.*", "(|)" * 40, "x" * 5000, "((a?)?)?" * 9],
)
def test_a_pattern_that_could_run_for_years_is_refused(pattern: str) -> None:
    assert ways(pattern) > MAX_WAYS


@pytest.mark.parametrize(
    "pattern",
    [r".*lm_head.*", r".*\.(q|k|v)_proj$", r"model\.layers\.(0|1|2|3|4|31)\..*", r"^(?!.*(?:mlp|attn)).*", "[*+|(]+"],
)
def test_patterns_that_people_write_are_tried(pattern: str) -> None:
    assert ways(pattern) <= MAX_WAYS


def test_a_choice_leaves_alone_what_is_no_packable_matrix() -> None:
    choice = WeightChoice(kind="mixed", layer_bits=(4, 8, 16), head_bits=8)
    given = [choice.scheme_of(f"model.layers.{i}.mlp.up_proj", out=64, in_=96) for i in range(4)]
    assert given == [INT4, INT8, None, None]
    assert choice.scheme_of("lm_head", out=64, in_=96) == INT8
    assert choice.scheme_of("model.embed_tokens", out=64, in_=96) is None
    assert choice.scheme_of("model.layers.0.input_layernorm", out=64, in_=96) is None
    assert choice.scheme_of("model.layers.0.mlp.up_proj", out=50, in_=96) is None


def test_a_choice_of_one_kind_holds_no_layer_of_the_other() -> None:
    with pytest.raises(ValueError, match="int4 has no layers of 8 bits"):
        WeightChoice(kind="int4", layer_bits=(4, 8))
