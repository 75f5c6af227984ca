"""A stand-in for CUDA graphs that runs on a CPU: the operations of some work, done again on the very same tensors.

Like a graph, a replay calls no Python of ours: numbers that were computed on the host, shapes and addresses are those
of the recording. Unlike CUDA, recording also does the work; a step can be done twice, as it writes to one slot.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime.fast.graphs import Work

WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "_unique2", "bincount")
"""Operations whose result, or its size, the host has to wait for."""


class NeverWaits(TorchDispatchMode):
    """Fails where the host would wait for the device; lists the operations it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"the host waits for {name}"
        result = func(*args, **(kwargs or {}))
        self.log.append((func, args, kwargs or {}, result))
        return result


class Replays:
    """A recorder; counts what was asked of it, and fails from the `fails_from`-th recording on."""

    def __init__(self, *, fails_from: int | None = None) -> None:
        self.runs, self.records, self.replays = 0, 0, 0
        self._fails_from = fails_from

    def run(self, work: Work) -> torch.Tensor:
        self.runs += 1
        return work()

    def record(self, work: Work) -> Work:
        self.records += 1
        if self._fails_from is not None and self.records >= self._fails_from:
            raise RuntimeError("this driver cannot capture")
        with NeverWaits() as seen:
            output = work()

        def replay() -> torch.Tensor:
            self.replays += 1
            for func, args, kwargs, kept in seen.log:
                again = func(*args, **kwargs)
                for old, new in zip(_tensors(kept), _tensors(again), strict=True):
                    if not _is_part_of(old, _tensors((args, kwargs))):
                        old.copy_(new)
            return output.clone()

        return replay


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _is_part_of(tensor: torch.Tensor, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether it is a view of an input, or the input itself: then its values are where they belong already."""
    return any(tensor.untyped_storage().data_ptr() == given.untyped_storage().data_ptr() for given in inputs)
