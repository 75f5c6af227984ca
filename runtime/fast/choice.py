"""With how many threads are the kernels fastest here, and are graphs faster? Measured on the model's own weights.

For kernels the answer is kept in the user's cache folder, one small file per machine, shape, dtype and number of
threads; a file that is damaged or about something else is measured anew. Graphs are measured whenever a model is
loaded: that takes no longer than some tens of steps.
"""

import hashlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from plans.commands.user_cache import cache_folder
from plans.errors import LlamaplanError
from plans.native.building import Unavailable
from plans.packed.scheme import Scheme
from plans.reading.strict import SchemaVersion, StrictModel
from plans.stages import StageRange
from runtime.fast.cache import FastLayer
from runtime.fast.graphs import GraphStage, Recorder
from runtime.fast.kernels import FastStage
from runtime.fast.native import MAX_ROWS, Library
from runtime.fast.products import packed_layers
from runtime.fast.speed import Choice
from runtime.reading.devices import synchronize

GRAPH_ROWS = (1, 2, 4, 8, 16, 32)
ROWS = (1, 2, 4, 8, MAX_ROWS)
"""Numbers of sequences, of one token each, whose steps are measured; more rows are read as prompts are."""
REPEATS = 3
MOST_SECONDS = 1.0
"""For one number of rows; the slowest ways are then timed fewer times."""
PAST_TOKENS = 128
SAMPLE_BYTES = 128 << 20
"""So many bytes of layers are timed (at least one layer): more than fits into a processor's own memory."""

_MAX_FILE_BYTES = 1 << 16


class Subject(StrictModel):
    """What a remembered choice holds for."""

    kernels: str
    torch: str
    transformers: str
    processors: int
    threads: int
    model_type: str
    dtype: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    has_layers: bool
    weights: str
    """How linear layers are packed, such as `int4 g32`; empty where none is."""


class Entry(StrictModel):
    """Up to so many rows: so many threads for the kernels."""

    rows: int
    threads: int


class Remembered(StrictModel):
    """A choice on disk."""

    schema_version: SchemaVersion = 1
    subject: Subject
    entries: tuple[Entry, ...]


def choose(
    model: PreTrainedModel, stage: StageRange, library: Library, *, progress: Callable[[str], None] | None = None
) -> Choice:
    """Return with how many threads the kernels compute which steps fastest on this machine.

    Args:
        model: a model whose weights are on the CPU.
        stage: the stage whose first layers (or head, without layers) are timed.
        library: the compiled kernels.
        progress: told that measuring starts.
    """
    subject = _subject(model, stage, library)
    path = _path(subject)
    known = None if path is None else recall(path, subject)
    if known is not None:
        return known
    if progress is not None:
        progress("measuring how many threads are fastest (once per machine and model shape)")
    choice = measure(model, stage, library)
    if path is not None:
        remember(path, subject, choice)
    return choice


def recall(path: Path, subject: Subject) -> Choice | None:
    """Return the choice in a file, or None if there is none for this subject that makes sense."""
    try:
        found = Remembered.read(path, max_bytes=_MAX_FILE_BYTES)
    except LlamaplanError:
        return None
    is_sensible = [entry.rows for entry in found.entries] == list(ROWS) and all(
        0 < entry.threads <= subject.threads for entry in found.entries
    )
    if found.subject != subject or not is_sensible:
        return None
    return for_steps((entry.rows, entry.threads) for entry in found.entries)


def for_steps(threads_by_rows: Iterable[tuple[int, int]]) -> Choice:
    """Return a choice for steps, by which prompts go layer by layer."""
    return Choice((*threads_by_rows, (MAX_ROWS + 1, 0)))


def remember(path: Path, subject: Subject, choice: Choice) -> None:
    """Write a choice, whole or not at all; where that is not possible the next run measures again."""
    entries = tuple(Entry(rows=rows, threads=threads) for rows, threads in choice.threads_by_rows if threads)
    text = Remembered(subject=subject, entries=entries).to_json()
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="choice-") as folder:
            partial = Path(folder) / path.name
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
    except OSError:
        return


def measure(model: PreTrainedModel, stage: StageRange, library: Library) -> Choice:
    """Time every number of rows with different numbers of threads, in turns."""
    sample = _Sample(model, stage)
    native = FastStage(library, sample.layers, model.config, norm=sample.norm, head=sample.head)
    candidates = tuple(_thread_counts())
    found = []
    for rows in ROWS:
        steps = {count: sample.native_step(native, rows, count) for count in candidates}
        found.append((rows, _fastest(sample, steps)))
    return for_steps(found)


def try_graphs(
    model: PreTrainedModel, stage: StageRange, recorder: Recorder, *, is_measured: bool
) -> Choice | Unavailable:
    """Return for which steps recorded graphs are used on a device, after having recorded some.

    Args:
        model: a model with its weights.
        stage: the stage whose first layers (or head, without layers) are tried.
        recorder: of the device where the stage lives.
        is_measured: whether transformers serves where that is faster; else graphs are used always.
    """
    sample, found = _Sample(model, stage), []
    graphs = GraphStage(sample.layers, model.config, recorder=recorder, norm=sample.norm, head=sample.head)
    for rows in GRAPH_ROWS if is_measured else (1,):
        step = sample.graph_step(graphs, rows)
        with torch.inference_mode():
            step()
            step()  # this one is recorded
        if graphs.failure is not None:
            return Unavailable(graphs.failure)
        found.append((rows, _fastest(sample, {0: sample.reference_step(rows), 1: step}) if is_measured else 1))
    return Choice(tuple(found))


@torch.inference_mode()
def _fastest(sample: "_Sample", steps: dict[int, Callable[[], object]]) -> int:
    """Return the number of threads whose step is fastest; 0 only if that is faster still."""
    seconds = dict.fromkeys(steps, float("inf"))
    began = time.perf_counter()
    for repeat, (threads, step) in itertools.product(range(-1, REPEATS), steps.items()):
        if repeat > 0 and time.perf_counter() - began > MOST_SECONDS:
            break
        synchronize(sample.device)
        started = time.perf_counter()
        step()
        synchronize(sample.device)
        if repeat >= 0:  # the first touches weights that may still be on disk
            seconds[threads] = min(seconds[threads], time.perf_counter() - started)
    best = min((threads for threads in steps if threads), key=lambda threads: seconds[threads])
    return best if seconds[best] <= seconds.get(0, float("inf")) else 0


def _thread_counts() -> Iterator[int]:
    """All threads, and half of them: where two share a core or a memory bus, fewer can be faster."""
    available = torch.get_num_threads()
    yield available
    if available > 1:
        yield available // 2


class _Sample:
    """Some layers of a stage, or its head if it has no layer, to run in several ways on made-up states."""

    def __init__(self, model: Any, stage: StageRange) -> None:
        base = model.base_model
        self._model, self._first = model, stage.start_layer
        self.layers = tuple(_some_layers(base.layers[stage.start_layer : stage.end_layer]))
        self.norm: Any = None if self.layers else base.norm
        self.head: Any = None if self.layers else model.lm_head
        first: Any = (*self.layers, self.head)[0]
        self.device: torch.device = next(first.parameters()).device

    def reference_step(self, rows: int) -> Callable[[], object]:
        """Return a step of transformers' modules."""
        hidden, cos, sin, positions = self._inputs(rows)
        cache = DynamicCache()
        for index, layer in enumerate(self.layers):
            cache.update(*self._states(layer, len(hidden)), self._first + index)

        def step() -> object:
            states = hidden if self.head is None else self.head(self.norm(hidden))
            for layer in self.layers:
                states = layer(
                    states,
                    attention_mask=None,
                    position_ids=positions,
                    position_embeddings=(cos, sin),
                    past_key_values=cache,
                    use_cache=True,
                )
            return states

        return step

    def native_step(self, native: FastStage, rows: int, threads: int) -> Callable[[], object]:
        """Return the same step on the kernels."""
        hidden, cos, sin, _ = self._inputs(rows)
        start, cache = torch.zeros(len(hidden), dtype=torch.int64), self._cache(len(hidden))
        if self.head is not None:
            return lambda: native.head(hidden, threads=threads)
        return lambda: native.decode(hidden, cos, sin, start=start, cache=cache, threads=threads)

    def graph_step(self, graphs: GraphStage, rows: int) -> Callable[[], object]:
        """Return the same step as a graph; the second call records it."""
        hidden, cos, sin, _ = self._inputs(rows)
        cache = self._cache(len(hidden))
        return lambda: graphs.step(hidden, cos, sin, attention_mask=None, cache=cache)

    def _cache(self, batch: int) -> list[FastLayer]:
        cache = [FastLayer() for _ in self.layers]
        for slots, layer in zip(cache, self.layers, strict=True):
            slots.update(*self._states(layer, batch))
        return cache

    def _inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        size = (rows, 1, self._model.config.hidden_size)
        hidden = torch.ones(size, dtype=self._model.dtype, device=self.device)
        positions = torch.full((rows, 1), PAST_TOKENS, device=self.device)
        rotary = self._model.base_model.rotary_emb
        cos, sin = rotary(hidden.to(rotary.inv_freq.device), position_ids=positions.to(rotary.inv_freq.device))
        return hidden, cos.to(self.device), sin.to(self.device), positions

    def _states(self, layer: Any, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (batch, self._model.config.num_key_value_heads, PAST_TOKENS, layer.self_attn.head_dim)
        states = torch.ones(shape, dtype=self._model.dtype, device=self.device)
        return states, states


def _some_layers(layers: Any) -> Iterator[Any]:
    size = 0
    for layer in layers:
        yield layer
        size += sum(weight.nbytes for weight in layer.parameters())
        if size >= SAMPLE_BYTES:
            return


def _subject(model: PreTrainedModel, stage: StageRange, library: Library) -> Subject:
    config = model.config
    return Subject(
        kernels=library.path.name,
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        processors=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        model_type=config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        has_layers=bool(stage.num_layers),
        weights=", ".join(sorted({scheme.words for scheme in _schemes(model, stage)})),
    )


def _schemes(model: Any, stage: StageRange) -> Iterator[Scheme]:
    measured = model.base_model.layers[stage.start_layer : stage.end_layer] if stage.num_layers else [model.lm_head]
    return (layer.scheme for layer in packed_layers(measured))


def _path(subject: Subject) -> Path | None:
    try:
        folder = cache_folder()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder / f"choice-{hashlib.sha256(subject.to_json().encode()).hexdigest()[:24]}.json"
