"""Changes the dtype of stored weights, value by value exactly as `torch.Tensor.to` does; the only user of torch."""

from collections.abc import Mapping

import torch

from plans.dtypes import STORED_DTYPES

_TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, dtype.torch) for name, dtype in STORED_DTYPES.items() if dtype.is_float
}


def convert_chunk(data: memoryview, *, source: str, target: str) -> memoryview:
    """Return the elements of `data` in another dtype.

    Args:
        data: whole elements, writable (torch maps it without a copy).
        source: stored dtype of `data`, any floating-point one.
        target: wanted dtype: F32, F16 or BF16. Values out of range become infinite, as torch rounds them.

    Example:
        >>> bytes(convert_chunk(memoryview(bytearray(b"\x00\x00\x80\x3f")), source="F32", target="BF16")).hex()
        '803f'
    """
    return memoryview(_converted(data, source, target).view(torch.uint8).numpy())  # type: ignore[arg-type]


def count_overflows(data: memoryview, *, source: str, target: str) -> int:
    """Return how many finite elements of `data` become infinite in the dtype `target`."""
    values = torch.frombuffer(data, dtype=_TORCH_DTYPES[source])
    if torch.finfo(values.dtype).max <= torch.finfo(_TORCH_DTYPES[target]).max:
        return 0
    return int((_converted(data, source, target).isinf() & ~values.isinf()).sum())


def _converted(data: memoryview, source: str, target: str) -> torch.Tensor:
    return torch.frombuffer(data, dtype=_TORCH_DTYPES[source]).to(_TORCH_DTYPES[target])
