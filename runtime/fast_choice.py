"""Is the native path faster here, and with how many threads? Measured once on the model's own weights, then remembered.

The answer is kept in the user's cache folder, one small file per machine, shape, dtype and number of threads; a file
that is damaged or about something else is measured anew.
"""

import hashlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from plans.errors import LlamaplanError
from plans.strict import SchemaVersion, StrictModel
from runtime.fast import FastStage
from runtime.fast_cache import FastLayer
from runtime.native import Library, cache_folder
from runtime.ranges import StageRange
from runtime.speed import Choice

STEP_ROWS = (1, 2, 4, 8, 16, 32)
PROMPT_ROWS = (128, 512)
ROWS = (*STEP_ROWS, *PROMPT_ROWS)
"""Numbers of rows that are measured: sequences of one token each, then prompts; the last stands for all longer ones."""
REPEATS = 3
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


class Entry(StrictModel):
    """Up to so many rows: so many threads for the kernels, 0 for transformers."""

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
    """Return for which steps the kernels are faster than transformers on this machine.

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
        progress("measuring which path is faster (once per machine and model shape)")
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
        0 <= entry.threads <= subject.threads for entry in found.entries
    )
    if found.subject != subject or not is_sensible:
        return None
    return Choice(tuple((entry.rows, entry.threads) for entry in found.entries))


def remember(path: Path, subject: Subject, choice: Choice) -> None:
    """Write a choice, whole or not at all; where that is not possible the next run measures again."""
    entries = tuple(Entry(rows=rows, threads=threads) for rows, threads in choice.threads_by_rows)
    text = Remembered(subject=subject, entries=entries).to_json()
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="choice-") as folder:
            partial = Path(folder) / path.name
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
    except OSError:
        return


def measure(model: PreTrainedModel, stage: StageRange, library: Library) -> Choice:
    """Time both paths for every number of rows, in turns."""
    sample = _Sample(model, stage, library)
    candidates = tuple(_thread_counts())
    return Choice(tuple((rows, _fastest(sample, rows, candidates)) for rows in ROWS))


@torch.inference_mode()
def _fastest(sample: "_Sample", rows: int, candidates: tuple[int, ...]) -> int:
    """Return the number of threads with which the kernels are fastest, or 0 if transformers is faster still."""
    steps = {0: sample.reference_step(rows)} | {count: sample.native_step(rows, count) for count in candidates}
    seconds = dict.fromkeys(steps, float("inf"))
    # Prompts come last and take long enough: by then all weights are in memory, and once is enough.
    repeats = (0,) if rows in PROMPT_ROWS else range(-1, REPEATS)
    for repeat, (threads, step) in itertools.product(repeats, steps.items()):
        started = time.perf_counter()
        step()
        if repeat >= 0:  # the first touches weights that may still be on disk
            seconds[threads] = min(seconds[threads], time.perf_counter() - started)
    best = min(candidates, key=lambda threads: seconds[threads])
    return best if seconds[best] <= seconds[0] else 0


def _thread_counts() -> Iterator[int]:
    """All threads, and half of them: where two share a core or a memory bus, fewer can be faster."""
    available = torch.get_num_threads()
    yield available
    if available > 1:
        yield available // 2


class _Sample:
    """Some layers of a stage, or its head if it has no layer, to run both ways on made-up states."""

    def __init__(self, model: Any, stage: StageRange, library: Library) -> None:
        base = model.base_model
        self._model, self._first = model, stage.start_layer
        self._layers = tuple(_some_layers(base.layers[stage.start_layer : stage.end_layer]))
        self._norm: Any = None if self._layers else base.norm
        self._head: Any = None if self._layers else model.lm_head
        self._native = FastStage(library, self._layers, model.config, norm=self._norm, head=self._head)

    def reference_step(self, rows: int) -> Callable[[], object]:
        """Return a step of transformers' modules."""
        hidden, cos, sin, positions = self._inputs(rows)
        cache = DynamicCache()
        for index, layer in enumerate(self._layers):
            cache.update(*self._states(layer, len(hidden)), self._first + index)

        def step() -> object:
            states = hidden if self._head is None else self._head(self._norm(hidden))
            for layer in self._layers:
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

    def native_step(self, rows: int, threads: int) -> Callable[[], object]:
        """Return the same step on the kernels."""
        hidden, cos, sin, _ = self._inputs(rows)
        start = torch.zeros(len(hidden), dtype=torch.int64)
        cache = [FastLayer() for _ in self._layers]
        for slots, layer in zip(cache, self._layers, strict=True):
            slots.update(*self._states(layer, len(hidden)))
        if self._head is not None:
            return lambda: self._native.head(hidden, threads=threads)
        return lambda: self._native.decode(hidden, cos, sin, start=start, cache=cache, threads=threads)

    def _inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, new_tokens = (1, rows) if rows in PROMPT_ROWS else (rows, 1)
        hidden = torch.ones((batch, new_tokens, self._model.config.hidden_size), dtype=self._model.dtype)
        positions = torch.arange(PAST_TOKENS, PAST_TOKENS + new_tokens).expand(batch, -1)
        rotary = self._model.base_model.rotary_emb
        cos, sin = rotary(hidden.to(rotary.inv_freq.device), position_ids=positions.to(rotary.inv_freq.device))
        return hidden, cos.to("cpu"), sin.to("cpu"), positions

    def _states(self, layer: Any, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (batch, self._model.config.num_key_value_heads, PAST_TOKENS, layer.self_attn.head_dim)
        return torch.ones(shape, dtype=self._model.dtype), torch.ones(shape, dtype=self._model.dtype)


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
    )


def _path(subject: Subject) -> Path | None:
    try:
        folder = cache_folder()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder / f"choice-{hashlib.sha256(subject.to_json().encode()).hexdigest()[:24]}.json"
