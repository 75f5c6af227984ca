"""Steps of a model of which some stages are fast, with transformers' own inputs and cache.

A step that they can serve goes stage by stage: on a CPU in one call of the native kernels, or layer by layer (many
rows); on CUDA as one recorded graph; elsewhere through the transformers layers, given what the model's own forward
would give them. Every other step is left to that forward, on the same cache.

Shapes: B sequences, S new tokens, T = past + S, R sequences of a ragged step, E hidden size, V vocabulary.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from plans.stages import StageRange
from runtime.fast.cache import STEP_SLOTS, FastLayer, adopt, hand_back
from runtime.fast.graphs import GraphStage
from runtime.fast.kernels import FastStage, first_slots, layer_window
from runtime.fast.native import MAX_ROWS
from runtime.fast.slots import Places, SlotCache, is_slot
from runtime.fast.speed import Choice
from runtime.reading.devices import synchronize
from runtime.stage_time import FAST_PATH, REFERENCE_PATH, StageTime

_KNOWN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
}


@dataclass(frozen=True, slots=True)
class PlainStep:
    """What a step is made of.

    Attributes:
        input_ids: [B, S].
        attention_mask: [B, T], or None when nothing is padded.
        position_ids: [B or 1, S], or None to count from the cache's length.
        cache: what it extends.
        logits_to_keep: how many of the last positions get logits; 0 for all.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    cache: DynamicCache
    logits_to_keep: int


def plain_step(arguments: Mapping[str, Any], config: PreTrainedConfig) -> PlainStep | None:
    """Return the step that a forward's arguments ask for, or None if they ask for anything beyond.

    Gradients, attention weights, hidden states, a loss, embeddings as input, tuples as output and caches of another
    kind are for transformers.
    """
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    cache, keep = arguments.get("past_key_values"), arguments.get("logits_to_keep", 0)
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or not isinstance(cache, DynamicCache):
        return None
    is_plain = (
        isinstance(keep, int)
        and (mask is None or isinstance(mask, torch.Tensor))
        and arguments.get("use_cache") is not False
        and arguments.get("return_dict", config.return_dict) in (None, True)
    )
    wants_more = (
        torch.is_grad_enabled()
        or bool(config.output_attentions or config.output_hidden_states)
        or any(value is not None and value is not False for name, value in arguments.items() if name not in _KNOWN)
    )
    return PlainStep(ids, mask, arguments.get("position_ids"), cache, keep) if is_plain and not wants_more else None


@dataclass(frozen=True, slots=True)
class Part:
    """One stage of a model.

    Attributes:
        units: what it holds; layers are counted as the model object counts them.
        fast: the kernels or the graphs for its units, if there are any.
        choice: for which steps they are used.
    """

    units: StageRange
    fast: FastStage | GraphStage | None
    choice: Choice

    def threads(self, *, num_rows: int) -> int:
        """Return the threads of the kernels (1 for a graph) for a step of so many rows; 0 where it is not one call."""
        return self.choice.threads(num_rows=num_rows) if self._is_usable else 0

    def serves(self, *, batch: int, new_tokens: int, past: int) -> int:
        """Return the same for one step. Graphs are of one token, on a cache that somebody else has begun."""
        can_replay = new_tokens == 1 and (past > 0 or not self.units.num_layers)
        return self.threads(num_rows=batch * new_tokens) if can_replay or isinstance(self.fast, FastStage) else 0

    @property
    def has_kernels(self) -> bool:
        """Whether every step is ours: in one call, or layer by layer."""
        return isinstance(self.fast, FastStage)

    def ragged_threads(self, *, num_rows: int) -> int:
        """Return the same for a ragged step: one path for every number of rows, as neighbours must change no bit.

        Torch takes each sequence alone; so what is faster for some number of rows is so for more.
        """
        most = _most_threads(self.choice) if self._is_usable else 0
        return most and (self.choice.threads(num_rows=num_rows) or most)

    @property
    def _is_usable(self) -> bool:
        return self.fast is not None and not (isinstance(self.fast, GraphStage) and self.fast.failure is not None)


@cache
def _most_threads(choice: Choice) -> int:
    return max(choice.threads(num_rows=count) for count in range(1, MAX_ROWS + 1))


@dataclass(frozen=True, slots=True)
class _Shared:
    """What every stage of a step needs, made once."""

    start: torch.Tensor  # [B] first slot that is no padding; read by kernels alone
    attention_mask: torch.Tensor | None  # [B, T]
    position_ids: torch.Tensor  # [B or 1, S]
    tables: tuple[torch.Tensor, torch.Tensor]  # cos and sin [B or 1, S, rotary_dim]
    masks: dict[bool, torch.Tensor | None]  # by "has a window"; empty when no stage needs them


class RotaryTables:
    """Rotary factors of single positions, looked up: the model's own module makes those of many at a time.

    Only of models that `supports_slots` admits: there the factors of a position depend on nothing else.
    """

    def __init__(self, rotary: Any) -> None:
        self._rotary = rotary
        self._tables: list[torch.Tensor] = []

    def at(self, positions: Sequence[int], *, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [R, 1, rotary_dim] of R positions, of the dtype of hidden states and on their device."""
        longest = max(positions)
        if not self._tables or len(self._tables[0]) <= longest:
            size = max(STEP_SLOTS, 1 << longest.bit_length())
            every = torch.arange(size, device=like.device)[None]
            self._tables = [table[0] for table in self._rotary(like, position_ids=every)]
        rows = torch.tensor(positions, device=like.device)
        cos, sin = (table[rows][:, None] for table in self._tables)
        return cos, sin


class FastModel:
    """The fast steps of a whole causal language model, or of one pruned to a stage.

    Example:
        >>> fast = FastModel(model, parts)  # doctest: +SKIP
        >>> logits = fast.step(token_ids, attention_mask=mask, position_ids=positions, cache=cache)  # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel, parts: Sequence[Part], *, reason: str | None = None) -> None:
        """Take a model and its stages in chain order; weights must not be moved or replaced from here on.

        Args:
            model: the model.
            parts: its stages.
            reason: why some of them are not fast although that was wanted, for people.
        """
        self.reason = reason
        self._model: Any = model
        self._parts = tuple(parts)
        self._has_kernels = any(part.has_kernels for part in parts)
        self._layers: tuple[Any, ...] = tuple(cast("Any", model.base_model).layers)
        self._rotary = RotaryTables(cast("Any", model.base_model).rotary_emb)
        self._windows = tuple(layer_window(layer, model.config) for layer in self._layers)
        # The fast path keeps all slots. Some way past a window that would be a waste: then transformers takes over.
        self._max_slots = min((w + STEP_SLOTS for w in self._windows if w), default=None)

    def __deepcopy__(self, _memo: object) -> None:
        """A copy of the model has its weights elsewhere, and so runs without this."""

    def path(self, index: int, *, num_rows: int) -> str:
        """Return which path serves a plain step of so many rows in a stage."""
        part = self._parts[index]
        return FAST_PATH if part.has_kernels or part.threads(num_rows=num_rows) else REFERENCE_PATH

    @torch.no_grad()
    def step(
        self,
        inputs: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        logits_to_keep: int = 1,
        times: Sequence[StageTime] = (),
    ) -> torch.Tensor | None:
        """Run new tokens through the stages and extend the cache by them.

        Args:
            inputs: token ids [B, S], or hidden states [B, S, E] where another process has embedded them.
            attention_mask: [B, T] with 0 for padding, or None when nothing is padded.
            position_ids: [B or 1, S]; None counts from the cache's length.
            cache: a `DynamicCache`; its layers become `FastLayer`s at the first call. None only without layers.
            logits_to_keep: how many of the last positions get logits; 0 for all.
            times: totals per stage to add to; stages that transformers computes are left to hooks.

        Returns:
            Logits [B, logits_to_keep or S, V] in the model's dtype, or hidden states [B, S, E] without a head. None,
            with no token computed, where this is nothing for the fast path: too many rows, a mask that is not plain
            left padding and some stage on a CPU, or a cache of another kind.
        """
        started = time.perf_counter()
        batch, new_tokens = inputs.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        threads = [part.serves(batch=batch, new_tokens=new_tokens, past=past) for part in self._parts]
        is_fast = self._has_kernels or any(threads)
        start = self._ready(inputs, past=past, attention_mask=attention_mask, cache=cache, is_fast=is_fast)
        if start is None:
            return None
        if position_ids is None:
            position_ids = torch.arange(past, past + new_tokens, device=inputs.device)[None]
        hidden = self._embed(inputs)
        needs_masks = any(part.units.num_layers and not count for part, count in zip(self._parts, threads, strict=True))
        shared = self._share(hidden, attention_mask, position_ids, cache, start=start, needs_masks=needs_masks)

        def run(part: Part, hidden: torch.Tensor, count: int) -> torch.Tensor:
            if count or part.has_kernels:
                return _fast(part, hidden, shared, cache, logits_to_keep=logits_to_keep, threads=count)
            return self._reference(part, hidden, shared, cache, logits_to_keep=logits_to_keep)

        return self._through(hidden, threads, run, started=started, times=times)

    @torch.no_grad()
    def ragged(
        self,
        inputs: torch.Tensor,
        *,
        slots: Sequence[int],
        cache: SlotCache,
        times: Sequence[StageTime] = (),
    ) -> torch.Tensor:
        """Run one new token of each of R sequences, of any lengths, and extend their slots by it.

        A sequence's numbers do not depend on the others: what no kernel or graph computes is computed for each sequence
        alone. `supports_slots` must admit the model.

        Args:
            inputs: token ids [R], or hidden states [R, E] where another process has embedded them.
            slots: where each sequence is in the cache; none twice, each with room for one more token.
            cache: keys and values of the model's layers.
            times: totals per stage to add to; stages that transformers computes are left to hooks.

        Returns:
            Logits [R, V] in the model's dtype, or hidden states [R, E] without a head.
        """
        started = time.perf_counter()
        threads = [part.ragged_threads(num_rows=len(inputs)) for part in self._parts]
        hidden = self._embed(inputs[:, None])  # [R, 1, E]
        lengths = [cache.length(slot) for slot in slots]
        tables = self._rotary.at(lengths, like=hidden)
        shared = [] if all(threads) else self._share_alone(hidden, lengths, [cache[slot] for slot in slots])

        def run(part: Part, hidden: torch.Tensor, count: int) -> torch.Tensor:
            if count:
                places = Places(cache, slots, lengths, part.units)
                return _fast_rows(part, hidden, tables, places, threads=count)
            rows = zip(hidden[:, None], shared, slots, strict=True)
            run_alone = partial(_fast, threads=0) if part.has_kernels else self._reference
            return torch.cat([run_alone(part, row, own, cache[slot], logits_to_keep=1) for row, own, slot in rows])

        return self._through(hidden, threads, run, started=started, times=times)[:, 0]

    def _through(
        self,
        hidden: torch.Tensor,
        threads: Sequence[int],
        run: Callable[[Part, torch.Tensor, int], torch.Tensor],
        *,
        started: float,
        times: Sequence[StageTime],
    ) -> torch.Tensor:
        """Run hidden states through the stages; hooks time those of transformers."""
        for index, (part, count) in enumerate(zip(self._parts, threads, strict=True)):
            if not count and not part.has_kernels:
                hidden = run(part, hidden, count)
                continue
            entered = started if index == 0 else time.perf_counter()
            device = part.fast.device if isinstance(part.fast, GraphStage) else torch.device("cpu")
            hidden = hidden.to(device, non_blocking=device.type != "cpu")  # the CPU would read too early
            arrived = started if index == 0 else _now(device, is_asked=bool(times))
            hidden = run(part, hidden, count)
            if times:
                times[index].hop_seconds += arrived - entered
                times[index].compute_seconds += _now(device, is_asked=True) - arrived
                times[index].num_fast_steps += 1
        return hidden

    def _ready(
        self,
        inputs: torch.Tensor,
        *,
        past: int,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        is_fast: bool,
    ) -> torch.Tensor | None:
        """Prepare the cache; return the first slots [B], or None if nothing fast can serve this step."""
        batch, new_tokens = inputs.shape[:2]
        if not self._layers:
            return torch.zeros(batch, dtype=torch.int64) if is_fast else None
        if cache is None:
            return None
        if self._max_slots is not None and past + new_tokens > self._max_slots and not is_slot(cache):
            hand_back(cache, self._model.config)
            return None
        # Graphs do not read prompts; on a cache that they can extend, nothing is copied afterwards.
        if not is_fast and past:
            return None
        if attention_mask is not None and attention_mask.shape[1:] != (past + new_tokens,):
            return None
        start = self._first_slots(attention_mask, batch=batch)
        return start if start is not None and adopt(cache, num_layers=len(self._layers)) and is_fast else None

    def _first_slots(self, attention_mask: torch.Tensor | None, *, batch: int) -> torch.Tensor | None:
        """Return the first slots [B] for the kernels. Graphs take any mask, and must not wait for one to be read."""
        if not self._has_kernels or attention_mask is None:
            return torch.zeros(batch, dtype=torch.int64)
        return first_slots(attention_mask.to("cpu"), batch=batch)

    def _embed(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self._parts[0].units.has_embedding:
            return inputs
        base = self._model.base_model
        hidden: torch.Tensor = base.embed_tokens(inputs)  # [B, S, E]
        multiplier = getattr(base, "embedding_multiplier", 1.0)
        return hidden if multiplier == 1.0 else hidden * multiplier

    def _share(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
        *,
        start: torch.Tensor,
        needs_masks: bool,
    ) -> _Shared:
        masks: dict[bool, torch.Tensor | None] = {}
        for has_window in {bool(window) for window in self._windows} if needs_masks else ():
            make: Any = create_sliding_window_causal_mask if has_window else create_causal_mask
            masks[has_window] = make(self._model.config, hidden, attention_mask, cache, position_ids)
        cos, sin = self._model.base_model.rotary_emb(hidden, position_ids=position_ids)
        return _Shared(start, attention_mask, position_ids, (cos, sin), masks)

    def _share_alone(self, hidden: torch.Tensor, lengths: Sequence[int], caches: Sequence[Cache]) -> list[_Shared]:
        """Return what transformers needs to take each sequence of a ragged step alone."""
        start = torch.zeros(1, dtype=torch.int64)
        positions = torch.tensor(lengths, device=hidden.device)[:, None, None]
        rows = zip(hidden[:, None], positions, caches, strict=True)
        return [self._share(row, None, position, cache, start=start, needs_masks=True) for row, position, cache in rows]

    def _reference(
        self, part: Part, hidden: torch.Tensor, shared: _Shared, cache: Cache | None, *, logits_to_keep: int
    ) -> torch.Tensor:
        """Run a stage's modules as the model's own forward runs them; hops and clocks are hooks on the modules."""
        for index in range(part.units.start_layer, part.units.end_layer):
            hidden = self._layers[index](
                hidden,
                attention_mask=shared.masks[bool(self._windows[index])],
                position_ids=shared.position_ids,
                position_embeddings=shared.tables,
                past_key_values=cache,
                use_cache=True,
            )
        if part.units.has_head:
            hidden = self._model.lm_head(self._model.base_model.norm(hidden)[:, -logits_to_keep:])
            scaling = getattr(self._model.config, "logits_scaling", 1.0)
            hidden = hidden if scaling == 1.0 else hidden / scaling
        return hidden


def _now(device: torch.device, *, is_asked: bool) -> float:
    """Read the clock, after what is queued on the device: but a step that nobody times must not wait for it."""
    if is_asked:
        synchronize(device)
    return time.perf_counter()


def _fast(
    part: Part, hidden: torch.Tensor, shared: _Shared, cache: Cache | None, *, logits_to_keep: int, threads: int
) -> torch.Tensor:
    units = part.units
    assert part.fast is not None
    assert cache is not None or not units.num_layers
    layers = cast("list[FastLayer]", cache.layers[units.start_layer : units.end_layer]) if cache is not None else []
    if isinstance(part.fast, GraphStage):
        return part.fast.step(hidden, *shared.tables, attention_mask=shared.attention_mask, cache=layers)
    cos, sin = (table.to("cpu") for table in shared.tables)
    if units.num_layers and threads:
        hidden = part.fast.decode(hidden, cos, sin, start=shared.start, cache=layers, threads=threads)
    elif units.num_layers:
        hidden = part.fast.read(hidden, cos, sin, masks=shared.masks, cache=layers)
    if units.has_head:
        hidden = hidden[:, -logits_to_keep:]
        hidden = part.fast.head(hidden, threads=part.threads(num_rows=hidden.shape[0] * hidden.shape[1]))
    return hidden


def _fast_rows(
    part: Part, hidden: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], places: Places, *, threads: int
) -> torch.Tensor:
    assert part.fast is not None
    if isinstance(part.fast, GraphStage):
        hidden = part.fast.ragged(hidden, *tables, places=places)
    else:
        cos, sin = (table.to("cpu") for table in tables)
        hidden = part.fast.ragged(hidden, cos, sin, places=places, threads=threads)
    places.extend()
    return hidden
