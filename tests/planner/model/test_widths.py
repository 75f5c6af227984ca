"""Profiles of packed weights: every byte as the format says, what stays as it is, and what cannot be packed at all."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from planner.model.packed import choice_of, unpacked_lines
from planner.model.profile import build_profile, unit_rows
from planner.model.widths import as_asked, narrower_than, packed
from plans.checkpoint.folder import open_checkpoint
from plans.config.config import SUPPORTED_FAMILIES
from plans.errors import UsageError
from plans.packed.config import quantization_config
from plans.packed.scheme import INT4
from plans.profile import ModelProfile
from tests.planner.cases import EVEN, TINY, bare, in_width, write_checkpoint

MATRICES = ((64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96))
"""q, k, v, o, gate, up, down of EVEN as (out, in)."""
NORMS = 2 * 64 * 2
SHAPE = 16
"""Bytes of `weight_shape`, which says how many rows and columns a matrix has."""


def by_formula(bits: int) -> int:
    """A layer: per matrix out x (in/2 + in/16) bytes in 4 bits, out x (in + in/16) in 8."""
    sizes = {4: lambda out, in_: out * (in_ // 2 + in_ // 16), 8: lambda out, in_: out * (in_ + in_ // 16)}
    return sum(sizes[bits](*sides) + SHAPE for sides in MATRICES) + NORMS


@pytest.mark.parametrize(("width", "bits"), [("int4", 4), ("int8", 8)])
def test_a_packed_layer_has_the_bytes_of_the_format_and_reads_them_once(width: str, bits: int) -> None:
    for layer in in_width(width).profile.layers:
        assert layer.weight_bytes == layer.decode_read_bytes == by_formula(bits)
        assert layer.weights == width


def test_packing_changes_bytes_alone() -> None:
    plain, narrow = build_profile(bare(**EVEN)), in_width("int4").profile
    changed = {"weight_bytes", "decode_read_bytes", "weights"}
    for unit, other in zip(plain.units, narrow.units, strict=True):
        assert unit.model_dump(exclude=changed) == other.model_dump(exclude=changed)
    assert (plain.total_parameters, plain.dtype) == (narrow.total_parameters, narrow.dtype)


def test_an_untied_head_gets_eight_bits_at_most_and_a_tied_one_stays_with_the_embedding() -> None:
    own, kept = in_width("int4").profile, in_width("int4", head="bf16").profile
    assert own.head.weight_bytes == 64 * (64 + 4) + SHAPE + 64 * 2
    assert kept.head.weight_bytes == (64 * 64 + 64) * 2
    tied = in_width("int4", bare(**EVEN, tie_word_embeddings=True)).profile
    assert tied.head.weight_bytes == tied.embedding.weight_bytes + 64 * 2
    assert tied.embedding.weights is tied.head.weights is None


def test_headers_and_a_bare_configuration_are_sized_alike(tmp_path: Path) -> None:
    plain = bare(**EVEN)
    tensors = {}
    for key, unit in unit_rows(plain).items():
        prefix = f"model.layers.{key[1]}." if key[0] == "layer" else ""
        tensors |= {prefix + name: row for name, row in unit.items()}
    stored = open_checkpoint(write_checkpoint(tmp_path / "even", tensors, TINY | EVEN))
    assert in_width("int8", stored).profile.units == in_width("int8").profile.units


def test_layers_of_several_widths_are_sized_one_by_one() -> None:
    plain = build_profile(bare(**EVEN))
    mixed = packed(bare(**EVEN), plain, choice_of((4, 16, 8, 4), head_bits=16)).profile
    sizes = [by_formula(4), plain.layers[0].weight_bytes, by_formula(8), by_formula(4)]
    assert [layer.weight_bytes for layer in mixed.layers] == sizes
    assert mixed.total_weight_bytes == sum(sizes) + plain.embedding.weight_bytes + plain.head.weight_bytes


def test_a_matrix_with_an_odd_side_stays_and_is_named_once() -> None:
    checkpoint = bare(**EVEN | {"intermediate_size": 80})
    narrow = in_width("int4", checkpoint)
    even = sum(out * (in_ // 2 + in_ // 16) + SHAPE for out, in_ in MATRICES[:4])
    assert narrow.profile.layers[0].weight_bytes == even + 3 * 64 * 80 * 2 + NORMS
    lines = list(unpacked_lines(unit_rows(checkpoint), narrow.choice))
    assert [line.split(" stays")[0] for line in lines] == [
        "mlp.gate_proj.weight of 4 layers (80 x 64)",
        "mlp.up_proj.weight of 4 layers (80 x 64)",
        "mlp.down_proj.weight of 4 layers (64 x 80)",
    ]


def test_a_layer_that_stays_as_it_is_is_not_called_packed() -> None:
    odd = bare(hidden_size=40, head_dim=10)
    assert in_width("int4", odd).profile.units == build_profile(odd).units


@pytest.mark.parametrize(
    ("changes", "dtype", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, None, "quantised already (gptq)"),
        ({"model_type": "mixtral", "intermediate_size": 80}, None, "its experts have sides of 64 and 80"),
        ({}, "fp32", "--dtype says fp32"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_the_reason(changes: dict[str, Any], dtype: Any, reason: str) -> None:
    checkpoint = bare(**EVEN | changes)
    plain = build_profile(checkpoint, dtype=dtype)
    with pytest.raises(UsageError) as refused:
        as_asked(checkpoint, plain, weights="int4")
    assert reason in str(refused.value)
    assert narrower_than(checkpoint, plain, None) == ()


def test_eight_bits_for_a_tied_head_and_a_width_of_the_head_alone_are_refused() -> None:
    tied = bare(**EVEN, tie_word_embeddings=True)
    with pytest.raises(UsageError, match="shares the embedding's table"):
        as_asked(tied, build_profile(tied), weights="int8", head="int8")
    with pytest.raises(UsageError, match="belongs to packed layers"):
        as_asked(bare(**EVEN), build_profile(bare(**EVEN)), weights="bf16", head="int8")


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_every_family_has_its_matrices_packed_but_for_routers(family: str) -> None:
    checkpoint = bare(**EVEN, model_type=family)
    shapes = {name: shape for name, (_dtype, shape) in unit_rows(checkpoint)["layer", 0].items()}
    matrices = {(n, shape) for n, shape in shapes.items() if len(shape) == 2 and not n.endswith(".gate.weight")}
    saved = sum(2 * math.prod(shape) - INT4.size_bytes(*shape) for _name, shape in matrices)
    plain = build_profile(checkpoint).layers[0]
    assert in_width("int4", checkpoint).profile.layers[0].weight_bytes == plain.weight_bytes - saved


def test_a_checkpoint_that_is_packed_already_says_so_in_its_units(tmp_path: Path) -> None:
    plain = bare(**EVEN)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    schemes = {}
    for key, unit in unit_rows(plain).items():
        prefix = f"model.layers.{key[1]}." if key[0] == "layer" else ""
        for name, (dtype, shape) in unit.items():
            module = (prefix + name).removesuffix(".weight")
            if key[0] == "layer" and len(shape) == 2:
                schemes[module] = INT4
                parts = {"packed": ("I32", INT4.packed_shape(*shape)), "scale": ("BF16", INT4.scale_shape(*shape)),
                         "shape": ("I64", (2,))}  # fmt: skip
                tensors |= {f"{module}.weight_{part}": row for part, row in parts.items()}
            else:
                tensors[prefix + name] = (dtype, shape)
    config = TINY | EVEN | {"quantization_config": quantization_config(schemes)}
    stored = build_profile(open_checkpoint(write_checkpoint(tmp_path / "packed", tensors, config)))
    narrow = in_width("int4", head="bf16").profile
    costs = {"weight_bytes", "decode_read_bytes", "weights", "parameters", "flops_per_token"}
    for unit, other in zip(stored.units, narrow.units, strict=True):
        assert unit.model_dump(include=costs) == other.model_dump(include=costs)


def test_a_profile_that_is_not_packed_is_written_as_before() -> None:
    written = json.loads(build_profile(bare(**EVEN)).to_json())
    assert "weights" not in written["units"][1]
    narrow = in_width("int8").profile
    assert ModelProfile.from_json(narrow.to_json().encode(), where="profile") == narrow
