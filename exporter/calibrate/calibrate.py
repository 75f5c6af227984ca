"""Calibrate all packed layers of a model on a text, first to last: each one sees what the packed ones before make."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from exporter.calibrate.gptq import Calibrated, Curvature, calibrate
from exporter.calibrate.layers import Inputs, Layers, States, linear_modules
from exporter.calibrate.text import Text
from exporter.packing.packer import Squares
from exporter.packing.scratch import Scratch
from plans.checkpoint.units import Checkpoint
from plans.packed.scheme import PACKED, SCALE, Scheme
from plans.packed.words import pack_numbers
from runtime.reading.families import parse_model_config
from runtime.reading.tensors import FolderTensors

Say = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Target:
    """Where calibrated matrices go, and in what form."""

    schemes: Mapping[str, Scheme]
    """By module; those of decoder layers are calibrated."""
    scale: torch.dtype
    kept: Scratch
    squares: dict[str, Squares]

    def keep(self, module: str, weights: torch.Tensor, found: Calibrated) -> None:
        """Put a matrix aside, packed."""
        self.kept.add(f"{module}.{PACKED}", pack_numbers(found.numbers.numpy(), self.schemes[module]))
        self.kept.add(f"{module}.{SCALE}", found.scales.view(torch.uint8).numpy().tobytes())
        exact = found.numbers.double() * found.scales.double().repeat_interleave(
            found.numbers.shape[1] // found.scales.shape[1], dim=1
        )
        original = weights.double()
        self.squares[module] = float((original - exact).square().sum()), float(original.square().sum())


def calibrate_layers(checkpoint: Checkpoint, target: Target, *, text: Text, num_threads: int, progress: Say) -> None:
    """Calibrate every layer that has packed modules.

    Args:
        checkpoint: the model as it was.
        target: which modules are packed, and where they go.
        text: what it is calibrated on.
        num_threads: how many compute; the result is the same.
        progress: told (layers done, layers in all).

    Raises:
        InputError: the family does not run, or the activations are not finite.
    """
    config = parse_model_config(checkpoint.config.raw)
    tensors = FolderTensors(checkpoint)
    num_layers = checkpoint.config.num_hidden_layers
    with Layers.of(config, tensors, num_threads=num_threads) as layers, torch.inference_mode():
        packed = original = layers.embed(text.windows)
        for index in range(num_layers):
            packed, original = _calibrate_layer(layers, index, target, tensors, packed, original)
            progress(index + 1, num_layers)


def _calibrate_layer(
    layers: Layers, index: int, target: Target, tensors: Mapping[str, torch.Tensor], packed: States, original: States
) -> tuple[States, States]:
    """Calibrate one layer and return what it makes of its inputs, packed and as it was."""
    stage = layers.load(index)
    modules = linear_modules(stage, index, target.schemes.keys())
    found, outputs = layers.originals_of(stage, modules, original)
    while found:  # what is done is forgotten
        own = found.pop(0)
        inputs = layers.inputs_of(stage, modules[own.modules[0]], packed, own)
        for module, rounded in _calibrated(layers, own.modules, inputs, target, tensors):
            target.keep(module, tensors[f"{module}.weight"], rounded)
            _put_in_place(modules[module], rounded)
    return layers.run(stage, packed), outputs


def _calibrated(
    layers: Layers, modules: Sequence[str], inputs: Inputs, target: Target, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, Calibrated]]:
    curvature = Curvature.of(inputs.hessian, inputs.missing, name=modules[0])
    tasks = [
        partial(calibrate, tensors[f"{module}.weight"], curvature, scheme=target.schemes[module], scale=target.scale)
        for module in modules
    ]
    yield from zip(modules, layers.map(tasks), strict=True)


def _put_in_place(module: Any, found: Calibrated) -> None:
    module.weight = torch.nn.Parameter(found.weights, requires_grad=False)
