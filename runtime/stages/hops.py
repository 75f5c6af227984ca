"""Hops: moving hidden states, and the step's small shared tensors, onto a stage's device.

The model's own forward computes masks and rotary tables once per step, on the first stage's device. Every stage that
lives elsewhere gets them copied once per step, when its first module starts; what is None stays None, because an
explicit mask would select another attention kernel. Caches are never moved: each layer's cache is created on the
device of its keys and stays there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Hop:
    """Forward pre-hooks that bring the inputs of one stage's modules to its device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def install(self, modules: Sequence[nn.Module]) -> None:
        """Hook the stage's modules, given in the order they run."""
        modules[0].register_forward_pre_hook(self._start_step)
        for module in modules:
            module.register_forward_pre_hook(self._bring_inputs, with_kwargs=True)

    def _start_step(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        self._moved.clear()

    def _bring_inputs(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = tuple(value.to(self.device) if isinstance(value, torch.Tensor) else value for value in args)
        return hidden, {name: self._bring_shared(value) for name, value in kwargs.items()}

    def _bring_shared(self, value: Any) -> Any:
        """Copy a mask, a position table or a pair of rotary tables once per step; leave everything else."""
        if isinstance(value, tuple):
            return tuple(self._bring_shared(item) for item in value)
        if not isinstance(value, torch.Tensor) or value.device == self.device:
            return value
        if id(value) not in self._moved:
            # Keeping the original alive keeps its id from being used again within the step.
            self._moved[id(value)] = (value, value.to(self.device))
        return self._moved[id(value)][1]
