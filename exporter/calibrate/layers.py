"""Run a model layer by layer over windows of a text, and gather what goes into its matrices.

Every window is computed alone, by one thread, and sums are added up in the order of the windows: the result does not
depend on how many threads there are. Layers compute in fp32.

Shapes: S tokens of a window, E hidden size, N inputs of a matrix.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
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

    def originals_of(
        self, stage: Stage, modules: Mapping[str, torch.nn.Module], states: States
    ) -> "tuple[list[Original], States]":
        """Return what goes into some modules of a stage, in the order they run, and what the stage makes of it.

        Modules with one input are together.
        """
        with _Recorder.on(modules) as recorder:
            tasks = (partial(_watch, stage, window, recorder) for window in states)
            found = list(in_order(self.pool, tasks, ahead=self.num_threads))
        together = zip(*(seen for seen, _ in found), strict=True)
        originals = [Original(tuple(seen[0][0]), [value for _, value in seen]) for seen in together]
        return originals, [output for _, output in found]

    def inputs_of(self, stage: Stage, module: torch.nn.Module, states: States, original: "Original") -> "Inputs":
        """Return what goes into a module of a stage, some of whose modules before are packed."""
        total: Inputs | None = None
        with _Recorder.on({original.modules[0]: module}, is_enough=True) as recorder:
            tasks = (partial(_gather, stage, *both, recorder) for both in zip(states, original.inputs, strict=True))
            for own in in_order(self.pool, tasks, ahead=self.num_threads):
                total = Inputs.none_like(own) if total is None else total
                total.add(own)
        assert total is not None
        return total

    def _build(self, spec: StageRange) -> Stage:
        return build_stage(self.config, spec, self.tensors, dtype=COMPUTE_DTYPE, device=CPU)


@dataclass(frozen=True, slots=True)
class Original:
    """What goes into modules that share an input, in the model as it was."""

    modules: tuple[str, ...]
    inputs: States
    """Of every window: [S, N]."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What goes into a module, X after modules that are packed and Y after those as they were, over all tokens."""

    hessian: torch.Tensor
    """X^T X [N, N], fp64."""
    missing: torch.Tensor
    """X^T (Y - X) [N, N], fp64."""

    @classmethod
    def none_like(cls, own: "Inputs") -> "Inputs":
        """Return zeros."""
        return cls(*(torch.zeros_like(part, dtype=torch.float64) for part in (own.hessian, own.missing)))

    def add(self, own: "Inputs") -> None:
        """Add up what went in with more tokens."""
        self.hessian.add_(own.hessian)
        self.missing.add_(own.missing)


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


Seen = list[tuple[list[str], torch.Tensor]]
"""Modules that share an input [S, N]."""


def _watch(stage: Stage, states: torch.Tensor, recorder: "_Recorder") -> tuple[Seen, torch.Tensor]:
    with torch.inference_mode(), recorder.recording() as seen:
        output = stage(states)
        return [(names, value.reshape(-1, value.shape[-1])) for names, value in seen], output


def _gather(stage: Stage, states: torch.Tensor, original: torch.Tensor, recorder: "_Recorder") -> Inputs:
    """Return the sums over one window, in fp32."""
    with torch.inference_mode(), recorder.recording() as seen:
        with suppress(_EnoughError):
            stage(states)
        ((_, value),) = seen
        own = value.reshape(original.shape)
        return Inputs(own.t() @ own, own.t() @ (original - own))


class _EnoughError(Exception):
    """What was wanted has been seen; the rest of the stage need not be computed."""


class _Recorder:
    """Remembers, for the thread it is called in, which module was given what."""

    def __init__(self, *, is_enough: bool) -> None:
        self._own = threading.local()
        self._is_enough = is_enough

    @classmethod
    @contextmanager
    def on(cls, modules: Mapping[str, torch.nn.Module], *, is_enough: bool = False) -> "Iterator[_Recorder]":
        """Watch some modules; if the first one `is_enough`, it is not computed."""
        recorder = cls(is_enough=is_enough)
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
        if self._is_enough:
            raise _EnoughError
