"""Rounding to nearest: close to the best there is, and the same bytes in one piece or in many."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plans.errors import InputError
from plans.packed.rounding import Rounded, round_to_nearest
from plans.packed.scheme import INT4, INT8, Scheme
from plans.packed.words import as_float64, pack_numbers, squares, unpack_numbers

SCHEMES = pytest.mark.parametrize("scheme", [INT4, INT8], ids=["int4", "int8"])


def stored(values: np.ndarray, dtype: str) -> memoryview:
    if dtype == "BF16":
        return memoryview((values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes())
    return memoryview(values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes())


def rounded(data: memoryview, scheme: Scheme, dtype: str = "BF16", scale: str = "BF16") -> Rounded:
    return round_to_nearest(data, stored=dtype, scheme=scheme, scale=scale, name="example")


def best_error(group: np.ndarray, bits: int) -> float:
    """The least squared error over many scales of both signs."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    extreme = np.abs(group).max() / -low
    errors = []
    for scale in extreme * np.concatenate((np.linspace(0.5, 1.2, 100), -np.linspace(0.5, 1.2, 100))):
        numbers = np.clip(np.rint(group / scale), low, high)
        best = (group @ numbers) / max(numbers @ numbers, 1)
        errors.append(((group - best * numbers) ** 2).sum())
    return float(min(errors))


@SCHEMES
@pytest.mark.parametrize(("dtype", "scale"), [("BF16", "BF16"), ("F16", "F16"), ("F32", "BF16"), ("F64", "F16")])
def test_what_is_packed_is_the_nearest_number_of_the_stored_scale(scheme: Scheme, dtype: str, scale: str) -> None:
    data = stored(np.random.default_rng(1).standard_normal(32 * 40), dtype)
    found = rounded(data, scheme, dtype, scale)
    weights = as_float64(data, dtype).reshape(-1, 32)
    scales = as_float64(found.scales, scale)[:, None]
    numbers = unpack_numbers(found.words, scheme).reshape(weights.shape)
    half = 1 << (scheme.bits - 1)
    nearest = np.clip(np.rint(weights / scales), -half, half - 1)
    assert (np.abs(numbers - nearest) <= (np.abs(weights / scales - np.rint(weights / scales)) > 0.4999)).all()
    error, squared = squares(data, found.words, found.scales, stored=dtype, scheme=scheme, scale=scale)
    assert found.squared_error == pytest.approx(error, rel=1e-5)
    assert found.squared == pytest.approx(squared, rel=1e-5)


def test_the_squared_error_is_within_five_percent_of_an_exhaustive_search() -> None:
    weights = np.random.default_rng(2).standard_normal((60, 32)).astype("<f4")
    found = rounded(stored(weights, "F32"), INT4, "F32")
    best = sum(best_error(group.astype(np.float64), 4) for group in weights)
    largest = (weights.astype(np.float64) - _by_largest(weights)) ** 2
    assert found.squared_error < 1.05 * best
    assert found.squared_error < 0.95 * largest.sum()


def _by_largest(weights: np.ndarray) -> np.ndarray:
    scales = np.abs(weights).max(axis=1, keepdims=True) / 7
    return np.clip(np.rint(weights / scales), -8, 7) * scales


@SCHEMES
@settings(max_examples=25)
@given(cuts=st.lists(st.integers(1, 8), min_size=1, max_size=6), seed=st.integers(0, 2**32 - 1))
def test_many_pieces_give_the_bytes_of_one(scheme: Scheme, cuts: list[int], seed: int) -> None:
    data = stored(np.random.default_rng(seed).standard_normal(32 * sum(cuts)), "BF16")
    whole, start, words, scales = rounded(data, scheme), 0, b"", b""
    for cut in cuts:
        piece = rounded(data[start : start + 64 * cut], scheme)
        words, scales, start = words + bytes(piece.words), scales + bytes(piece.scales), start + 64 * cut
    assert (words, scales) == (bytes(whole.words), bytes(whole.scales))


def test_blocks_end_where_they_end() -> None:
    data = stored(np.random.default_rng(3).standard_normal(32 * 4100), "BF16")
    whole, tail = rounded(data, INT4), rounded(data[64 * 4096 :], INT4)
    assert bytes(whole.words[16 * 4096 :]) == bytes(tail.words)


@SCHEMES
def test_numbers_survive_packing(scheme: Scheme) -> None:
    half = 1 << (scheme.bits - 1)
    numbers = np.random.default_rng(4).integers(-half, half, (3, 64)).astype(np.int8)
    packed = pack_numbers(numbers, scheme)
    assert len(packed) == numbers.size * scheme.bits // 8
    assert (unpack_numbers(memoryview(packed), scheme) == numbers.reshape(-1)).all()


@SCHEMES
def test_zeros_and_the_smallest_floats_stay_what_they_are(scheme: Scheme) -> None:
    weights = np.zeros(96)
    weights[40], weights[70] = 1e-39, 2.0
    found = rounded(stored(weights, "F32"), scheme, "F32")
    numbers, scales = unpack_numbers(found.words, scheme), as_float64(found.scales, "BF16")
    assert np.isfinite(scales).all()
    assert not numbers[:32].any()
    assert numbers[70] * scales[2] == 2.0
    assert found.squared_error < 1e-70


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_nan_and_infinity_are_refused_wherever_they_lie(value: float, dtype: str) -> None:
    for place in (0, 31, 33):
        weights = np.ones(64)
        weights[place] = value
        with pytest.raises(InputError, match="example: holds NaN or infinite"):
            rounded(stored(weights, dtype), INT4, dtype)


def test_a_weight_too_large_for_a_scale_in_fp16_is_refused() -> None:
    with pytest.raises(InputError, match="too large for a scale in fp16"):
        rounded(stored(np.full(32, 1e30), "F32"), INT8, "F32", "F16")
