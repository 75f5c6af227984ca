"""Putting the fast path under the stages of a model, or saying why that is not possible here."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from plans.native.building import Unavailable
from plans.stages import StageRange
from runtime.fast import native
from runtime.fast.choice import ROWS, choose, try_graphs
from runtime.fast.graphs import CudaRecorder, GraphStage, Recorder, supports_graphs
from runtime.fast.kernels import FastStage, supports, supports_weights
from runtime.fast.model import FastModel, Part
from runtime.fast.native import Library
from runtime.fast.products import attach, has_packed
from runtime.fast.speed import Choice, Speed

Progress = Callable[[str], None]
MakePart = Callable[[StageRange], Part]

RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""Types of devices whose steps can be recorded."""


def set_up(
    model: PreTrainedModel,
    stages: Sequence[StageRange],
    devices: Sequence[torch.device],
    *,
    speed: Speed,
    progress: Progress | None = None,
) -> FastModel | Unavailable | None:
    """Return the fast steps of a loaded model.

    Args:
        model: a causal language model with its weights, whole or pruned to one stage.
        stages: its stages in chain order, layers counted as the model counts them.
        devices: where each of them lives; those on a CPU (kernels) and on CUDA (graphs) can be fast.
        speed: what is wanted.
        progress: told, in a few words, what takes time: compiling and measuring.

    Returns:
        None when the reference path serves everything because that was asked for, is faster (CUDA), or no stage is on
        a CPU or on CUDA. `Unavailable` when nothing can be fast; where only some devices fail, the others are fast.
    """
    if speed is Speed.REFERENCE:
        return None
    by_device: dict[torch.device, list[StageRange]] = {}
    for stage, device in zip(stages, devices, strict=True):
        if _computes(stage):
            by_device.setdefault(device, []).append(stage)
    found = {d: _maker(model, those, d, speed=speed, progress=progress) for d, those in by_device.items()}
    reason = next((maker.reason for maker in found.values() if isinstance(maker, Unavailable)), None)
    makers = {device: maker for device, maker in found.items() if not isinstance(maker, Unavailable | None)}
    if not makers:
        return Unavailable(reason) if reason is not None else None
    parts = [
        makers[device](stage) if device in makers and _computes(stage) else Part(stage, None, Choice(()))
        for stage, device in zip(stages, devices, strict=True)
    ]
    return FastModel(model, parts, reason=reason)


def _computes(stage: StageRange) -> bool:
    return bool(stage.num_layers or stage.has_head)


def _maker(
    model: PreTrainedModel,
    stages: Sequence[StageRange],
    device: torch.device,
    *,
    speed: Speed,
    progress: Progress | None,
) -> MakePart | Unavailable | None:
    """Return what makes the fast parts of a device, or None where transformers is to serve."""
    if device.type in RECORDERS:
        return _graphs(model, stages, RECORDERS[device.type](device), speed=speed)
    return _kernels(model, stages, speed=speed, progress=progress) if device.type == "cpu" else None


def _kernels(
    model: PreTrainedModel, stages: Sequence[StageRange], *, speed: Speed, progress: Progress | None
) -> MakePart | Unavailable | None:
    modules = [_modules(model, stage) for stage in stages]
    reason = next(filter(None, (supports(model.config), *map(supports_weights, modules))), None)
    if reason is not None and not any(map(has_packed, modules)):
        return Unavailable(reason)
    library = native.load(on_build=progress)
    if isinstance(library, Unavailable):
        return library
    attach([module for those in modules for module in those], library)
    if reason is not None:
        return Unavailable(reason)
    choice = _always() if speed is Speed.MAX else choose(model, stages[0], library, progress=progress)
    return lambda stage: Part(stage, _native(model, stage, library), choice)


def _graphs(
    model: PreTrainedModel, stages: Sequence[StageRange], recorder: Recorder, *, speed: Speed
) -> MakePart | Unavailable | None:
    if reason := supports_graphs(model.config):
        return Unavailable(reason)
    choice = try_graphs(model, stages[0], recorder, is_measured=speed is Speed.AUTO)
    if isinstance(choice, Unavailable):
        return choice
    return (lambda stage: Part(stage, recorded(model, stage, recorder), choice)) if choice.is_ever_fast else None


def whole(model: PreTrainedModel, library: Library, choice: Choice) -> FastModel:
    """Return the fast steps of an unsplit model on a CPU that `supports` and `supports_weights` admit."""
    units = StageRange.whole(model.config.num_hidden_layers)
    return FastModel(model, [Part(units, _native(model, units, library), choice)])


def recorded(model: PreTrainedModel, stage: StageRange, recorder: Recorder) -> GraphStage:
    """Return a stage whose steps are recorded; `supports_graphs` must admit the model."""
    norm, head = _ends(model, stage)
    return GraphStage(_layers(model, stage), model.config, recorder=recorder, norm=norm, head=head)


def _always() -> Choice:
    return Choice(((ROWS[-1], torch.get_num_threads()),))


def _modules(model: Any, stage: StageRange) -> list[Any]:
    return [*_layers(model, stage), *(_ends(model, stage) if stage.has_head else ())]


def _native(model: PreTrainedModel, stage: StageRange, library: Library) -> FastStage:
    norm, head = _ends(model, stage)
    return FastStage(library, _layers(model, stage), model.config, norm=norm, head=head)


def _layers(model: Any, stage: StageRange) -> Any:
    return model.base_model.layers[stage.start_layer : stage.end_layer]


def _ends(model: Any, stage: StageRange) -> tuple[Any, Any]:
    return (model.base_model.norm, model.lm_head) if stage.has_head else (None, None)
