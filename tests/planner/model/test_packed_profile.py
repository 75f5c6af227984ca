"""Packed weights are sized to the byte: from headers, and from a configuration alone."""

from pathlib import Path
from typing import Any

import pytest

from planner.model.profile import build_profile
from plans.checkpoint.folder import open_checkpoint
from plans.errors import InputError
from plans.packed.config import quantization_config
from plans.packed.scheme import INT4, INT8, Scheme
from plans.profile import ModelProfile
from tests.planner.cases import TINY, write_checkpoint

Tensors = dict[str, tuple[str, tuple[int, ...]]]

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
SHAPES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
}  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm")


def checkpoint_of(schemes: tuple[Scheme, ...], *, scale: str = "BF16") -> tuple[Tensors, dict[str, Any]]:
    """Tensors and configuration of a tiny model, one scheme per layer."""
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (64, 64)), "lm_head.weight": ("BF16", (64, 64))}
    tensors["model.norm.weight"] = ("BF16", (64,))
    packed = {}
    for index, scheme in enumerate(schemes):
        prefix = f"model.layers.{index}"
        tensors |= {f"{prefix}.{norm}.weight": ("BF16", (64,)) for norm in NORMS}
        for name, (out, in_) in SHAPES.items():
            module = f"{prefix}.{name}"
            packed[module] = scheme
            tensors[f"{module}.weight_packed"] = ("I32", scheme.packed_shape(out, in_))
            tensors[f"{module}.weight_scale"] = (scale, scheme.scale_shape(out, in_))
            tensors[f"{module}.weight_shape"] = ("I64", (2,))
    return tensors, TINY | SIZES | {"quantization_config": quantization_config(packed)}


def profile_of(folder: Path, **options: Any) -> ModelProfile:
    return build_profile(open_checkpoint(folder), **options)


@pytest.mark.parametrize("scale", ["BF16", "F32"])
@pytest.mark.parametrize("schemes", [(INT4, INT4), (INT8, INT4), (Scheme(4, 64), Scheme(8, None))], ids=str)
def test_a_packed_layer_costs_its_packed_bytes_and_stands_for_its_parameters(
    schemes: tuple[Scheme, ...], scale: str, tmp_path: Path
) -> None:
    profile = profile_of(write_checkpoint(tmp_path, *checkpoint_of(schemes, scale=scale)))
    numbers = sum(out * in_ for out, in_ in SHAPES.values())
    for layer, scheme in zip(profile.layers, schemes, strict=True):
        scales = sum(out * (in_ // scheme.group_size if scheme.group_size else 1) for out, in_ in SHAPES.values())
        packed = numbers * scheme.bits // 8 + len(SHAPES) * 16 + len(NORMS) * 64 * 2
        assert layer.weight_bytes == layer.decode_read_bytes == packed + scales * 2  # scales run in the model's dtype
        assert layer.stored_weight_bytes == packed + scales * (2 if scale == "BF16" else 4)
        assert layer.parameters == numbers + 2 * 64
        assert layer.flops_per_token == 2 * numbers
    assert profile.head.weight_bytes == (64 * 64 + 64) * 2
    assert (profile.dtype, profile.model.quantization) == ("bf16", "compressed-tensors")
    assert profile.model.packing == " and ".join(sorted({scheme.words for scheme in schemes}))
    assert profile.differences == ()


def test_in_another_dtype_everything_but_the_packed_numbers_changes_its_size(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, *checkpoint_of((INT4, INT8)))
    stored, wide = profile_of(folder), profile_of(folder, dtype="fp32")
    assert wide.head.weight_bytes == 2 * stored.head.weight_bytes
    assert wide.embedding.decode_read_bytes == 2 * stored.embedding.decode_read_bytes
    numbers = sum(out * in_ // 2 + 16 for out, in_ in SHAPES.values())
    assert wide.layers[0].weight_bytes - numbers == 2 * (stored.layers[0].weight_bytes - numbers)


def test_a_configuration_alone_gives_the_units_of_the_headers(tmp_path: Path) -> None:
    tensors, config = checkpoint_of((INT8, INT4))
    folder = write_checkpoint(tmp_path / "whole", tensors, config)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((folder / "config.json").read_bytes())
    bare = profile_of(tmp_path / "bare" / "config.json")
    assert bare.units == profile_of(folder).units
    assert bare.differences == ()


def test_a_profile_without_packed_weights_says_nothing_of_them(tmp_path: Path) -> None:
    tensors, config = checkpoint_of((INT4, INT4))
    assert '"packing": "int4 g32"' in profile_of(write_checkpoint(tmp_path / "a", tensors, config)).to_json()
    gptq = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert "packing" not in profile_of(write_checkpoint(tmp_path / "b", tensors, gptq)).to_json()


UP = "model.layers.1.mlp.up_proj"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no scale": ({"weight_scale": None}, r"UP\.weight_\w+ is there, and no UP\.weight_scale"),
    "no shape": ({"weight_shape": None}, r"no UP\.weight_shape"),
    "no numbers": ({"weight_packed": None}, r"no UP\.weight_packed"),
    "scale of another shape": ({"weight_scale": ("BF16", (128, 3))}, r"UP\.weight_scale has shape \[128, 3\]"),
    "numbers of another shape": (
        {"weight_packed": ("I32", (128, 16)), "weight_scale": ("BF16", (128, 4))},
        r"UP\.weight_packed has shape \[128, 16\], .* \[128, 8\]",
    ),
    "a group that does not divide": ({"weight_packed": ("I32", (128, 7))}, r"UP\.weight_packed holds 56 columns"),
    "numbers of one axis": ({"weight_packed": ("I32", (1024,))}, r"UP\.weight_packed has shape \[1024\]"),
    "scales of integers": ({"weight_scale": ("I8", (128, 2))}, r"UP\.weight_scale is I8"),
    "zero points": ({"weight_zero_point": ("I32", (16, 2))}, r"UP\.weight_zero_point holds zero points"),
    "act-order": ({"weight_g_idx": ("I32", (64,))}, r"UP\.weight_g_idx holds columns in another order"),
    "not packed": (
        {"weight_packed": None, "weight_scale": None, "weight_shape": None, "weight": ("BF16", (128, 64))},
        r"no tensor UP\.weight_packed",
    ),
}  # fmt: skip


@pytest.mark.row("P22")
@pytest.mark.parametrize("what", WRONG)
def test_headers_that_contradict_the_packing_are_refused_by_the_tensors_name(what: str, tmp_path: Path) -> None:
    changes, message = WRONG[what]
    tensors, config = checkpoint_of((INT4, INT4))
    for part, row in changes.items():
        tensors.pop(f"{UP}.{part}", None)
        tensors |= {f"{UP}.{part}": row} if row else {}
    with pytest.raises(InputError, match=message.replace("UP", UP)) as caught:
        profile_of(write_checkpoint(tmp_path, tensors, config))
    assert caught.value.exit_code == 3


def test_packed_tensors_that_the_configuration_leaves_alone_are_refused(tmp_path: Path) -> None:
    tensors, config = checkpoint_of((INT4, INT4))
    config["quantization_config"]["ignore"].append(UP)
    with pytest.raises(InputError, match=rf"{UP}\.weight_packed is packed, and quantization_config leaves .* alone"):
        profile_of(write_checkpoint(tmp_path, tensors, config))
