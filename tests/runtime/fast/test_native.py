"""The decode kernels as a library: compiled by the real compiler, and called with raw pointers."""

import ctypes
from pathlib import Path

import pytest
import torch

from plans.native.building import Unavailable, find_compiler, load_from
from runtime.fast import native
from runtime.fast.native import Library


def test_the_real_compiler_builds_a_library_that_loads(tmp_path: Path) -> None:
    compiler = find_compiler()
    assert not isinstance(compiler, Unavailable)
    assert isinstance(load_from(tmp_path / "kernels.so", native.SOURCE, Library, compiler=compiler), Library)


def test_a_second_load_finds_what_the_first_one_built(kernels: Library) -> None:
    builds: list[str] = []
    found = native.load(on_build=builds.append)
    assert isinstance(found, Library)
    assert found.path == kernels.path
    assert not builds


def test_reading_memory_covers_every_tensor(kernels: Library) -> None:
    tensors = [torch.zeros(3), torch.zeros(100_003, dtype=torch.bfloat16), torch.zeros(0)]
    assert kernels.read_memory(tensors, threads=2) == 12 + 200_006


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_may_lie_at_any_address(kernels: Library, dtype: torch.dtype, offset: int) -> None:
    torch.manual_seed(0)
    hidden, norm, weight = torch.randn(3, 41).to(dtype), torch.ones(41, dtype=dtype), torch.randn(37, 41).to(dtype)
    aligned = _logits(kernels, hidden, norm, weight, weight.data_ptr())
    size = weight.numel() * weight.element_size()
    buffer = ctypes.create_string_buffer(size + offset)
    ctypes.memmove(ctypes.addressof(buffer) + offset, weight.data_ptr(), size)
    assert torch.equal(aligned, _logits(kernels, hidden, norm, weight, ctypes.addressof(buffer) + offset))


def _logits(
    kernels: Library, hidden: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, address: int
) -> torch.Tensor:
    logits = hidden.new_empty(len(hidden), len(weight))
    count = kernels.num_counters(native.Shape(), num_layers=0, vocab_size=len(weight))
    scratch, counters = torch.empty(100_000), torch.empty(count, dtype=torch.int64)
    head = native.Head(
        openmp=kernels.openmp_address,
        threads=2,
        dtype=native.DTYPES[hidden.dtype],
        rows=len(hidden),
        hidden_size=hidden.shape[1],
        vocab_size=len(weight),
        norm_eps=1e-6,
        logits_scaling=1.0,
        inputs=hidden.data_ptr(),
        norm=norm.data_ptr(),
        weight=native.Linear(weight=address),
        logits=logits.data_ptr(),
        workspace=scratch.data_ptr(),
        counters=counters.data_ptr(),
    )
    kernels.compute_logits(head)
    return logits
