"""Weights in other people's formats: as many as the original has, in the bytes that are stored, or refused by name."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from planner.model.profile import build_profile
from plans.checkpoint.folder import open_checkpoint
from plans.dtypes import STORED_DTYPES
from plans.errors import InputError
from plans.profile import ModelProfile
from tests.planner.model.test_other_families import write_headers

pytestmark = pytest.mark.row("P2")
Row = tuple[str, tuple[int, ...]]
Pack = Callable[[str, int, int], Mapping[str, Row]]
"""(module, outputs, inputs) -> the tensors it is stored in."""

HIDDEN, VOCAB, GROUP = 128, 96, 64
KNOWN, OTHER = "llama", "seed_oss"
MATRICES = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (192, 128),
    "mlp.up_proj": (192, 128),
    "mlp.down_proj": (128, 192),
}
PARAMETERS = 2 * VOCAB * HIDDEN + HIDDEN + 2 * (2 * HIDDEN + sum(map(math.prod, MATRICES.values())))


def gptq(bits: int) -> Pack:
    return lambda _module, out, in_: {
        "qweight": ("I32", (in_ * bits // 32, out)),
        "qzeros": ("I32", (in_ // GROUP, out * bits // 32)),
        "scales": ("F16", (in_ // GROUP, out)),
        "g_idx": ("I32", (in_,)),
    }


def awq(_module: str, out: int, in_: int) -> Mapping[str, Row]:
    return {
        "qweight": ("I32", (in_, out // 8)),
        "qzeros": ("I32", (in_ // GROUP, out // 8)),
        "scales": ("F16", (in_ // GROUP, out)),
    }


def pack_quantized(_module: str, out: int, in_: int) -> Mapping[str, Row]:
    scale = ("BF16", (out, in_ // GROUP))
    return {"weight_packed": ("I32", (out, in_ // 8)), "weight_scale": scale, "weight_shape": ("I64", (2,))}


def fp8(_module: str, out: int, in_: int) -> Mapping[str, Row]:
    scale = ("F32", (-(-out // 128), -(-in_ // 128)))
    return {"weight": ("F8_E4M3", (out, in_)), "weight_scale_inv": scale, "input_scale": ("F32", ())}


def eight_bits(_module: str, out: int, in_: int) -> Mapping[str, Row]:
    return {"weight": ("I8", (out, in_)), "SCB": ("F32", (out,))}


def nvfp4(_module: str, out: int, in_: int) -> Mapping[str, Row]:
    return {
        "weight": ("U8", (out, in_ // 2)),
        "weight_scale": ("F8_E4M3", (out, in_ // 16)),
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    }


def nvfp4_of_compressed_tensors(module: str, out: int, in_: int) -> Mapping[str, Row]:
    names = {"weight": "weight_packed", "weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}
    return {names.get(name, name): row for name, row in nvfp4(module, out, in_).items()}


def mxfp4(scale: str = "U8", group: int = 32) -> Pack:
    return lambda _module, out, in_: {
        "weight": ("U8", (out, in_ // 2)),
        "weight_scale": (scale, (out, in_ // group)),
    }


def w8a8(*scale: int) -> Pack:
    return lambda _module, out, in_: {
        "weight": ("I8", (out, in_)),
        "weight_scale": ("BF16", tuple({-1: out, -2: in_ // GROUP}.get(side, side) for side in scale)),
    }


def plain(_module: str, out: int, in_: int) -> Mapping[str, Row]:
    return {"weight": ("F16", (out, in_))}


def larger_in_eight_bits(module: str, out: int, in_: int) -> Mapping[str, Row]:
    return gptq(8)(module, out, in_) if module.startswith("mlp.") else gptq(4)(module, out, in_)


def said(method: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": method} | more


BITS_4 = {"bits": 4, "group_size": GROUP}


def groups(*bits: int, size: int | None = GROUP) -> dict[str, Any]:
    weights = ({"num_bits": num, "group_size": size, "type": "int"} for num in bits)
    return {"config_groups": {f"group_{index}": {"weights": table} for index, table in enumerate(weights)}}


def profile_of(folder: Path, family: str, pack: Pack, quantization: Mapping[str, Any] | None) -> ModelProfile:
    table: dict[str, Row] = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), ("F16", (VOCAB, HIDDEN)))
    table["model.norm.weight"] = ("F16", (HIDDEN,))
    for layer in range(2):
        at = f"model.layers.{layer}."
        table |= {f"{at}{n}.weight": ("F16", (HIDDEN,)) for n in ("input_layernorm", "post_attention_layernorm")}
        for module, sides in MATRICES.items():
            table |= {f"{at}{module}.{part}": row for part, row in pack(module, *sides).items()}
    config: dict[str, Any] = {
        "model_type": family, "architectures": ["Model"], "hidden_size": HIDDEN, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192, "vocab_size": VOCAB,
        "tie_word_embeddings": False, "max_position_embeddings": 64, "torch_dtype": "float16",
    }  # fmt: skip
    if quantization is not None:
        config["quantization_config"] = quantization
    profile = build_profile(open_checkpoint(write_headers(folder, config, table)))
    assert profile.total_weight_bytes == sum(
        STORED_DTYPES[dtype].size_bytes * math.prod(shape) for dtype, shape in table.values()
    )
    return profile


RIGHT: dict[str, tuple[Pack, dict[str, Any]]] = {
    "GPTQ": (gptq(4), said("gptq", **BITS_4)),
    "GPTQ in 8 bits": (gptq(8), said("gptq", bits=8, group_size=GROUP)),
    "GPTQ in 3 bits, which words do not divide": (gptq(3), said("gptq", bits=3, group_size=GROUP)),
    "AWQ": (awq, said("awq", **BITS_4)),
    "compressed-tensors": (pack_quantized, said("compressed-tensors", **groups(4))),
    "FP8 in blocks": (fp8, said("fp8", weight_block_size=[128, 128])),
    "W8A8, a scale for each row": (w8a8(-1, 1), said("compressed-tensors", **groups(8, 8, size=None))),
    "W8A8, one scale": (w8a8(1), said("compressed-tensors", **groups(8, size=None))),
    "W8A8, a scale for each group": (w8a8(-1, -2), said("compressed-tensors", **groups(8))),
    "bitsandbytes, 8 bits": (eight_bits, said("bitsandbytes", load_in_8bit=True)),
    "NVFP4 of ModelOpt": (nvfp4, said("modelopt", quant_algo="NVFP4", group_size=16)),
    "NVFP4 of compressed-tensors": (nvfp4_of_compressed_tensors, said("compressed-tensors", **groups(4, size=16))),
    "MXFP4 of Quark": (mxfp4(), said("quark", global_quant_config={"weight": {"dtype": "fp4", "group_size": 32}})),
    "MXFP4, scales by their own name": (mxfp4("F8_E8M0"), said("quark")),
}


@pytest.mark.parametrize("family", [KNOWN, OTHER])
@pytest.mark.parametrize("name", RIGHT)
def test_packed_weights_are_as_many_as_the_originals(name: str, family: str, tmp_path: Path) -> None:
    assert profile_of(tmp_path, family, *RIGHT[name]).total_parameters == PARAMETERS


@pytest.mark.parametrize("quantization", [said("gptq", **BITS_4, dynamic={}), said("auto-round", **BITS_4)], ids=str)
def test_layers_in_other_bits_than_said_are_refused_or_known_by_their_family(
    quantization: dict[str, Any], tmp_path: Path
) -> None:
    assert profile_of(tmp_path / "known", KNOWN, larger_in_eight_bits, quantization).total_parameters == PARAMETERS
    with pytest.raises(InputError, match=r"gate_proj\.qweight of shape .* are not 4 bits in groups of 64"):
        profile_of(tmp_path / "other", OTHER, larger_in_eight_bits, quantization)


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_bits_that_contradict_the_scales_are_refused(bits: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"self_attn\.k_proj\.qweight of shape .* are not {bits} bits"):
        profile_of(tmp_path, OTHER, gptq(4), said("gptq", bits=bits, group_size=GROUP))


def fp8_of_a_tensor(_module: str, out: int, in_: int) -> Mapping[str, Row]:
    return {"weight": ("F8_E4M3", (out, in_)), "weight_scale": ("F32", ())}


@pytest.mark.row("P6")
@pytest.mark.parametrize("family", [KNOWN, OTHER])
@pytest.mark.parametrize("pack", [fp8, fp8_of_a_tensor, nvfp4])
def test_scaled_weights_and_no_word_on_them_are_refused_with_the_words_that_size_them(
    pack: Pack, family: str, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=r"q_proj\.weight is (F8_E4M3|U8) with a scale .*hf_quant_config\.json"
    ) as caught:
        profile_of(tmp_path / "bare", family, pack, None)
    table = re.search(r'"quantization_config": (\{.*\}) in', caught.value.expected)
    assert table is not None
    assert profile_of(tmp_path / "said", family, pack, json.loads(table[1])).total_parameters == PARAMETERS


NOT_UNDERSTOOD: dict[str, tuple[Pack, dict[str, Any]]] = {
    "four bits in 8-bit integers": (w8a8(-1, 1), said("compressed-tensors", **groups(4))),
    "a scale for two rows": (w8a8(64, 1), said("compressed-tensors", **groups(8))),
    "groups of another size": (w8a8(-1, -2), said("compressed-tensors", **groups(8, size=32))),
    "two in a byte, scales of 16": (mxfp4("U8", 16), said("quark")),
    "two in a byte, scales of 32 in FP8": (
        lambda m, out, in_: nvfp4(m, out, in_) | {"weight_scale": ("F8_E4M3", (out, in_ // 32))},
        said("modelopt"),
    ),
    "two in a byte, 8 bits said": (mxfp4(), said("quark", bits=8)),
    "bytes in a row": (lambda _m, out, in_: {"weight": ("U8", (out * in_,)), "scale": ("F32", ())}, said("quanto")),
}


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_scales_that_do_not_say_how_many_weights_lie_in_a_tensor_refuse_it_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"self_attn\.[qk]_proj\.weight holds .*how many weights that is"):
        profile_of(tmp_path, OTHER, *NOT_UNDERSTOOD[name])


@pytest.mark.parametrize("name", RIGHT)
def test_packed_projections_of_another_width_than_the_cache_counts_are_refused(name: str, tmp_path: Path) -> None:
    pack, quantization = RIGHT[name]

    def wider(module: str, out: int, in_: int) -> Mapping[str, Row]:
        return pack(module, 2 * out if module == "self_attn.k_proj" else out, in_)

    with pytest.raises(InputError, match=r"self_attn\.k_proj gives 128 numbers per token, config\.json says 64"):
        profile_of(tmp_path, OTHER, wider, quantization)


OF_ANOTHER_MODEL: dict[str, tuple[Pack, dict[str, Any]]] = {
    "GPTQ": (lambda m, out, in_: gptq(4)(m, 2 * out, in_), said("gptq", **BITS_4)),
    "AWQ": (lambda m, out, in_: awq(m, out, 2 * in_), said("awq", **BITS_4)),
    "FP8": (lambda m, out, in_: fp8(m, out, 2 * in_), said("fp8")),
    "8 bits": (lambda m, out, in_: eight_bits(m, 3 * out, in_), said("bitsandbytes", load_in_8bit=True)),
    "not quantised": (lambda m, out, in_: plain(m, 2 * out, in_), said("bitsandbytes", load_in_4bit=True)),
}


@pytest.mark.parametrize("name", OF_ANOTHER_MODEL)
def test_quantised_weights_of_a_model_of_other_sizes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"self_attn\.q_proj\.q?weight is .* cannot hold the \[128, 128\] weights"):
        profile_of(tmp_path, KNOWN, *OF_ANOTHER_MODEL[name])


def test_a_quantised_module_that_is_not_there_is_named(tmp_path: Path) -> None:
    def pack(module: str, out: int, in_: int) -> Mapping[str, Row]:
        return {} if module == "mlp.down_proj" else eight_bits(module, out, in_)

    with pytest.raises(InputError, match=r"no tensor of model\.layers\.0\.mlp\.down_proj\.weight, quantised or not"):
        profile_of(tmp_path, KNOWN, pack, said("bitsandbytes", load_in_8bit=True))


def without(part: str, pack: Pack) -> Pack:
    """The same, but that one layer's part is missing."""

    def packed(module: str, out: int, in_: int) -> Mapping[str, Row]:
        rows = pack(module, out, in_)
        return {name: row for name, row in rows.items() if name != part or module != "mlp.up_proj"}

    return packed


LOST = {
    "GPTQ, scales": (without("scales", gptq(4)), said("gptq", **BITS_4), r"qweight .* no .*\.scales"),
    "GPTQ, zeros": (without("qzeros", gptq(4)), said("gptq", **BITS_4), r"qweight .* no .*\.qzeros"),
    "AWQ, scales": (without("scales", awq), said("awq", **BITS_4), r"qweight .* no .*\.scales"),
    "AWQ, zeros": (without("qzeros", awq), said("awq", **BITS_4), r"qweight .* no .*\.qzeros"),
    "bitsandbytes": (without("SCB", eight_bits), said("bitsandbytes", load_in_8bit=True), "weight .* no scale"),
    "FP8": (without("weight_scale_inv", fp8), said("fp8"), "weight .* no scale"),
    "NVFP4": (without("weight_scale", nvfp4), said("modelopt"), "weight .* no scale"),
    "NVFP4, second scale": (without("weight_scale_2", nvfp4), said("modelopt"), r"weight .* no .*\.weight_scale_2"),
}


@pytest.mark.row("P6")
@pytest.mark.parametrize("family", [KNOWN, OTHER])
@pytest.mark.parametrize("name", LOST)
def test_a_quantised_layer_that_lacks_a_part_is_refused_by_the_name_of_both(
    name: str, family: str, tmp_path: Path
) -> None:
    pack, quantization, lost = LOST[name]
    with pytest.raises(InputError, match=rf"model\.layers\.0\.mlp\.up_proj\.{lost}"):
        profile_of(tmp_path, family, pack, quantization)


@pytest.mark.row("P20")
@pytest.mark.parametrize("method", [4, ["fp8"], True])
def test_a_method_that_is_no_name_is_refused(method: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="/quantization_config/quant_method: is "):
        profile_of(tmp_path, KNOWN, gptq(4), {"quant_method": method, **BITS_4})
