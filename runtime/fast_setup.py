"""Putting the native kernels under the stages of a model, or saying why that is not possible here."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from runtime import native
from runtime.fast import FastStage, supports, supports_weights
from runtime.fast_choice import ROWS, choose
from runtime.fast_model import FastModel, Part
from runtime.native import Library, Unavailable
from runtime.ranges import StageRange
from runtime.speed import Choice, Speed

Progress = Callable[[str], None]


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
        devices: where each of them lives; those on a CPU can be fast.
        speed: what is wanted.
        progress: told, in a few words, what takes time: compiling and measuring, once per machine.

    Returns:
        None when the reference path serves everything because that was asked for, is faster, or no stage is on a CPU.
    """
    is_candidate = [
        device.type == "cpu" and bool(stage.num_layers or stage.has_head)
        for stage, device in zip(stages, devices, strict=True)
    ]
    if speed is Speed.REFERENCE or not any(is_candidate):
        return None
    reason = supports(model.config)
    for stage, chosen in zip(stages, is_candidate, strict=True):
        reason = reason or (supports_weights(_modules(model, stage)) if chosen else None)
    if reason is not None:
        return Unavailable(reason)
    library = native.load(on_build=progress)
    if isinstance(library, Unavailable):
        return library
    choice = _choice(model, stages[is_candidate.index(True)], library, speed=speed, progress=progress)
    if not choice.is_ever_native:
        return None
    natives = [_native(model, s, library) if c else None for s, c in zip(stages, is_candidate, strict=True)]
    return FastModel(model, [Part(s, n, choice) for s, n in zip(stages, natives, strict=True)])


def whole(model: PreTrainedModel, library: Library, choice: Choice) -> FastModel:
    """Return the fast steps of an unsplit model on a CPU that `supports` and `supports_weights` admit."""
    units = StageRange("cpu", 0, model.config.num_hidden_layers, has_embedding=True, has_head=True)
    return FastModel(model, [Part(units, _native(model, units, library), choice)])


def _choice(
    model: PreTrainedModel, stage: StageRange, library: Library, *, speed: Speed, progress: Progress | None
) -> Choice:
    return _always() if speed is Speed.MAX else choose(model, stage, library, progress=progress)


def _always() -> Choice:
    return Choice(((ROWS[-1], torch.get_num_threads()),))


def _modules(model: Any, stage: StageRange) -> list[Any]:
    base = model.base_model
    return [*base.layers[stage.start_layer : stage.end_layer], *([base.norm, model.lm_head] if stage.has_head else [])]


def _native(model: PreTrainedModel, stage: StageRange, library: Library) -> FastStage:
    whole_model, base = cast("Any", model), cast("Any", model.base_model)
    layers = base.layers[stage.start_layer : stage.end_layer]
    ends = {"norm": base.norm, "head": whole_model.lm_head} if stage.has_head else {}
    return FastStage(library, layers, model.config, **ends)
