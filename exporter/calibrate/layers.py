"""Run a model layer by layer over windows of a text, and gather what goes into its matrices.

Every window is computed alone, by one thread, and sums are added up in the order of the windows: the result does not
depend on how many threads there are. Layers compute in fp32.

Shapes: S tokens of a window, E hidden size, N inputs of a matrix.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig

from exporter.packing.ordered import in_order
from plans.stages import StageRange
from runtime.reading.weights import TensorSource
from runtime.stages.stage import Stage, build_stage

Result = TypeVar("Result")
COMPUTE_DTYPE = torch.float32
CPU = torch.device("cpu")
States = list[torch.Tensor]
"""Of every window: [1, S, E]."""


@dataclass(frozen=True, slots=True)
class Layers:
    """The units of a model, loaded one at a time."""

    config: PreTrainedConfig
    tensors: TensorSource
    pool: ThreadPoolExecutor
    num_threads: int

    @classmethod
    @contextmanager
    def of(cls, config: PreTrainedConfig, tensors: TensorSource, *, num_threads: int) -> "Iterator[Layers]":
        """Start threads that compute alone; torch's own are stopped meanwhile, as their number changes results."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(num_threads, initializer=partial(torch.set_num_threads, 1)) as pool:
                yield cls(config, tensors, pool, num_threads)
        finally:
            torch.set_num_threads(before)

    def embed(self, windows: Iterable[Sequence[int]]) -> States:
        """Return what the embedding makes of every window."""
        stage = self._build(StageRange("cpu", 0, 0, has_embedding=True, has_head=False))
        return self.run(stage, [torch.tensor([window]) for window in windows])

    def load(self, index: int) -> Stage:
        """Load one decoder layer."""
        return self._build(StageRange("cpu", index, index + 1, has_embedding=False, has_head=False))

    def run(self, stage: Stage, inputs: States) -> States:
        """Return what a stage makes of every window."""
        return list(in_order(self.pool, (partial(_run, stage, states) for states in inputs), ahead=self.num_threads))

    def map(self, tasks: Iterable[Callable[[], Result]]) -> list[Result]:
        """Return the results of tasks that compute on their own."""
        return list(in_order(self.pool, map(partial(partial, _alone), tasks), ahead=self.num_threads))

    def inputs_of(self, stage: Stage, modules: Mapping[str, torch.nn.Module], inputs: States) -> "list[Inputs]":
        """Return what goes into some modules of a stage, in the order they run; those with one input together."""
        gathered: list[Inputs] = []
        with _Recorder.on(modules) as recorder:
            tasks = (partial(_gather, stage, states, recorder) for states in inputs)
            for found in in_order(self.pool, tasks, ahead=self.num_threads):
                gathered = gathered or [
                    Inputs(names, torch.zeros_like(own, dtype=torch.float64)) for names, own in found
                ]
                for total, (names, own) in zip(gathered, found, strict=True):
                    assert total.modules == names
                    total.hessian.add_(own)
        return gathered

    def _build(self, spec: StageRange) -> Stage:
        return build_stage(self.config, spec, self.tensors, dtype=COMPUTE_DTYPE, device=CPU)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What goes into modules that share an input."""

    modules: tuple[str, ...]
    hessian: torch.Tensor
    """X^T X over all tokens [N, N], fp64."""


def linear_modules(stage: Stage, index: int, names: Collection[str]) -> dict[str, torch.nn.Module]:
    """Return the linear modules of a layer among `names`, by their names in the whole model."""
    base: Any = stage.model.base_model
    own = {f"model.layers.{index}.{name}": module for name, module in base.layers[0].named_modules()}
    return {name: module for name, module in own.items() if name in names}


def _alone(task: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return task()


def _run(stage: Stage, states: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return stage(states)  # type: ignore[no-any-return]


def _gather(stage: Stage, states: torch.Tensor, recorder: "_Recorder") -> list[tuple[tuple[str, ...], torch.Tensor]]:
    """Return X^T X [N, N] of one window for every input."""
    with torch.inference_mode(), recorder.recording() as seen:
        stage(states)
        rows = [(tuple(names), value.reshape(-1, value.shape[-1])) for names, value in seen]  # [S, N]
        return [(names, value.t() @ value) for names, value in rows]


Seen = list[tuple[list[str], torch.Tensor]]


class _Recorder:
    """Remembers, for the thread it is called in, which module was given what."""

    def __init__(self) -> None:
        self._own = threading.local()

    @classmethod
    @contextmanager
    def on(cls, modules: Mapping[str, torch.nn.Module]) -> "Iterator[_Recorder]":
        recorder = cls()
        handles = [module.register_forward_pre_hook(partial(recorder._see, name)) for name, module in modules.items()]
        try:
            yield recorder
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def recording(self) -> Iterator[Seen]:
        seen: Seen = []
        self._own.seen = seen
        yield seen
        self._own.seen = None

    def _see(self, name: str, _module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen: Seen = self._own.seen
        known = next((names for names, value in seen if value is arguments[0]), None)
        if known is not None:
            known.append(name)
        else:
            seen.append(([name], arguments[0]))
