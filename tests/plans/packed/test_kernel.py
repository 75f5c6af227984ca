"""The compiled rounding gives numpy's bytes, sums and errors, whatever the weights."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plans.errors import InputError
from plans.native.building import Unavailable
from plans.packed import kernel, rounding
from plans.packed.blocks import round_blocks
from plans.packed.kernel import Kernel, find_kernel
from plans.packed.rounding import round_to_nearest
from plans.packed.scheme import INT4, INT8, Scheme

WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
SMALLEST, LEAST_NORMAL, LARGEST = 2.0**-149, 2.0**-126, float(np.finfo(np.float32).max)
SPECIAL = (
    0.0,
    -0.0,
    SMALLEST,
    -SMALLEST,
    LEAST_NORMAL,
    -9 * LEAST_NORMAL,
    1e-7,
    65504.0,
    -65520.0,
    1e19,
    1e30,
    -LARGEST,
)
NOT_FINITE = (np.nan, np.inf, -np.inf, 1e300)
Draw = Callable[[np.random.Generator, int], np.ndarray]

KINDS: dict[str, Draw] = {
    "like a model's": lambda rng, count: rng.standard_normal(count) / 50,
    "of all sizes": lambda rng, count: np.ldexp(rng.standard_normal(count), rng.integers(-150, 60, count)),
    "a size per group": lambda rng, count: np.ldexp(
        rng.standard_normal(count), np.repeat(rng.integers(-150, 60, count // 32), 32)
    ),
    "ties": lambda rng, count: np.ldexp(rng.integers(-16, 17, count) / 2.0, np.repeat(rng.integers(-9, 9), count)),
    "of one sign": lambda rng, count: -np.abs(np.ldexp(rng.standard_normal(count), -124)),
    "the smallest": lambda rng, count: rng.integers(-3, 4, count) * SMALLEST,
    "zeros": lambda rng, count: np.where(rng.integers(0, 2, count), 0.0, -0.0),
}


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nobody has looked for the kernel yet, and what is found is forgotten."""
    find_kernel.cache_clear()
    yield
    find_kernel.cache_clear()


def stored(values: np.ndarray, dtype: str) -> memoryview:
    with np.errstate(over="ignore"):
        if dtype == "BF16":
            return memoryview((values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes())
        return memoryview(values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes())


def by_numpy(data: memoryview, dtype: str, scheme: Scheme, scale: str) -> tuple[Any, ...]:
    num_groups = len(data) // (32 * WIDTHS[dtype])
    words, scales = np.empty((num_groups, scheme.bits), "<u4"), np.empty(num_groups, "<u2")
    sums = round_blocks(data, words, scales, stored=dtype, scheme=scheme, scale=scale, name="example")
    return words.tobytes(), scales.tobytes(), *sums


def as_exported(data: memoryview, dtype: str, scheme: Scheme, scale: str) -> tuple[Any, ...]:
    found = round_to_nearest(data, stored=dtype, scheme=scheme, scale=scale, name="example")
    return bytes(found.words), bytes(found.scales), found.squared_error, found.squared


def outcome(how: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
    """What is rounded, sums as bytes so that NaN equals NaN; or the error in full."""
    try:
        with np.errstate(all="ignore"):
            *parts, error, squared = how(*arguments)
    except InputError as refused:
        return refused.code, str(refused)
    return *parts, np.array([error, squared]).tobytes()


HOW = {
    "dtype": st.sampled_from(sorted(WIDTHS)),
    "scheme": st.sampled_from([INT4, INT8]),
    "scale": st.sampled_from(["BF16", "F16"]),
}


@settings(max_examples=300)
@given(
    **HOW,
    kind=st.sampled_from(sorted(KINDS)),
    num_groups=st.integers(1, 130),
    seed=st.integers(0, 2**32 - 1),
    special=st.dictionaries(st.integers(0, 32 * 130), st.sampled_from(SPECIAL + NOT_FINITE), max_size=5),
)
@example("BF16", INT4, "F16", "like a model's", 130, 0, {70: 1e30, 3000: np.nan})
@example("F32", INT4, "BF16", "of one sign", 65, 1, {})
def test_any_weights_give_the_bytes_the_sums_and_the_error_of_numpy(
    dtype: str, scheme: Scheme, scale: str, kind: str, num_groups: int, seed: int, special: dict[int, float]
) -> None:
    values = KINDS[kind](np.random.default_rng(seed), 32 * num_groups).astype(np.float64)
    for place, value in special.items():
        values[place % len(values)] = value
    how = stored(values, dtype), dtype, scheme, scale
    assert outcome(as_exported, *how) == outcome(by_numpy, *how)


@settings(max_examples=100)
@given(**HOW, data=st.binary(min_size=256, max_size=256))
def test_any_bits_give_what_numpy_makes_of_them(dtype: str, scheme: Scheme, scale: str, data: bytes) -> None:
    how = memoryview(data), dtype, scheme, scale
    assert outcome(as_exported, *how) == outcome(by_numpy, *how)


@pytest.mark.parametrize("num_groups", [1, 63, 64, 65, 4095, 4096, 4097, 8259])
def test_runs_may_end_anywhere(num_groups: int) -> None:
    values = np.random.default_rng(num_groups).standard_normal(32 * num_groups)
    for scheme in (INT4, INT8):
        how = stored(values, "BF16"), "BF16", scheme, "BF16"
        assert outcome(as_exported, *how) == outcome(by_numpy, *how)


def test_weights_may_lie_at_any_address() -> None:
    data = bytes(stored(np.random.default_rng(5).standard_normal(32 * 70), "F32"))
    for offset in (0, 1, 3):
        moved = memoryview(bytes(offset) + data)[offset:]
        assert outcome(as_exported, moved, "F32", INT4, "BF16") == outcome(by_numpy, moved, "F32", INT4, "BF16")


@pytest.mark.parametrize("dtype", sorted(WIDTHS))
def test_where_there_is_a_compiler_its_code_rounds(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(find_kernel(), Kernel)
    data = stored(np.random.default_rng(6).standard_normal(32 * 70), dtype)
    expected = by_numpy(data, dtype, INT4, "BF16")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("numpy was asked")

    monkeypatch.setattr(rounding, "round_blocks", refuse)
    assert as_exported(data, dtype, INT4, "BF16") == expected


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("0.9f", "0.8f"),
        ("sum = mixed[lane] + 0.0f", "sum = mixed[lane]"),
        ("FLT_MIN", "0x1p-149f"),
        ("+ 0x1.8p23f - 0x1.8p23f", "+ (value < 0 ? -0.5f : 0.5f), value = (float)(int)value"),
        ("bits + 0x7FFF + (bits >> 16 & 1)", "bits + 0x8000"),
        ("0xFFF + (magnitude >> 13 & 1)", "0x1000"),
        ("from_bits(magnitude) + 0.5f", "from_bits(magnitude) + 0.25f"),
        ("0x1p112f", "0x1p111f"),
    ],
)
def test_code_that_computes_anything_else_is_not_used(
    before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = kernel.SOURCE.file.read_text()
    assert before in text
    (tmp_path / "rounding.c").write_text(text.replace(before, after))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel, "SOURCE", replace(kernel.SOURCE, file=tmp_path / "rounding.c"))
    found = find_kernel()
    assert isinstance(found, Unavailable)
    assert found.reason == "the compiled rounding gives other numbers than numpy"
