"""The stored tensors of a checkpoint folder, the dtypes they are read in, and the devices they go to."""

import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open

from plans.checkpoint.units import Checkpoint, StoredTensor, require_full
from plans.dtypes import DTYPE_NAMES, DTYPES
from plans.errors import UsageError
from plans.stages import StageRange
from runtime.reading.devices import planned_device, torch_device
from runtime.reading.pages import prefer_huge_pages


class FolderTensors(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint folder by name; a lookup maps the tensor, nothing is read before it is used.

    The files stay open, and must stay unchanged, for as long as a tensor of theirs lives.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = require_full(checkpoint)
        self._stored = checkpoint.tensors
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        if stored.file not in self._open:
            self._open[stored.file] = safe_open(self._folder / stored.file, framework="pt", device="cpu")
            self._prefer_huge_pages(stored)
        tensor: torch.Tensor = self._open[stored.file].get_tensor(stored.name)
        return tensor

    def _prefer_huge_pages(self, stored: StoredTensor) -> None:
        """Ask for them before anything of the file is read, where tensors are views of its mapping."""
        begin = self._open[stored.file].get_tensor(stored.name).data_ptr() - stored.entry.begin
        size = max(other.entry.end for other in self._stored.values() if other.file == stored.file)
        if begin % mmap.PAGESIZE == 0:
            prefer_huge_pages(begin, size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored


def place_stages(stages: Sequence[StageRange], *, device_map: Mapping[int, str]) -> tuple[torch.device, ...]:
    """Return the torch device of each stage, after overrides."""
    unknown = sorted(set(device_map) - set(range(len(stages))))
    if unknown:
        raise UsageError(
            f"the device map names stage {unknown[0]}",
            expected=f"a stage from 0 to {len(stages) - 1}",
            code="E-DEVICE",
        )
    return tuple(
        torch_device(device_map[index]) if index in device_map else planned_device(stage.device)
        for index, stage in enumerate(stages)
    )


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of `fp32`, `bf16`, `fp16` or their long names."""
    if name not in DTYPE_NAMES:
        raise UsageError(f"dtype {name} is not known", expected="fp32, bf16 or fp16", code="E-DTYPE")
    dtype: torch.dtype = getattr(torch, DTYPES[DTYPE_NAMES[name]].torch)
    return dtype
