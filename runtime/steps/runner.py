"""What one stage keeps per sequence, and how it computes a step. The same in one process and in several.

Shapes: N tokens of a step, E hidden size, V vocabulary, R rows of an answer, W numbers per row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache

from plans.errors import PeerError
from runtime.steps.choice import Drawer, width_of
from runtime.steps.parts import PROMPT, Opening, Part


class Units(Protocol):
    """What is computed here: the whole model, or one stage of it."""

    has_head: bool

    def new_cache(self) -> Cache | None:
        """Return an empty cache; None where nothing is kept."""

    def extend(self, inputs: torch.Tensor, *, start: int, cache: Cache | None, keep: int) -> torch.Tensor:
        """Run tokens [1, N] or hidden states [1, N, E] of one sequence; returns [1, N, E], or logits [1, `keep`, V]."""


@dataclass(slots=True)
class Held:
    """A sequence on one stage.

    Attributes:
        opening: what was said about it.
        drawer: chooses its tokens; None on every stage but the last.
        length: tokens in its slot; None until its first step, which takes the slot over.
    """

    opening: Opening
    drawer: Drawer | None
    length: int | None = None


class OwnCaches:
    """A cache of its own for every slot.

    Args:
        new_cache: makes an empty one.
    """

    def __init__(self, new_cache: Callable[[], Any]) -> None:
        self._new_cache = new_cache
        self._caches: dict[int, Any] = {}

    def __getitem__(self, slot: int) -> Any:
        """Return the cache of a slot."""
        if slot not in self._caches:
            self._caches[slot] = self._new_cache()
        return self._caches[slot]

    def keep(self, slot: int, *, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens of a slot."""
        if num_tokens == 0:
            self._caches.pop(slot, None)
        elif (cache := self[slot]) is not None and (surplus := cache.get_seq_length() - num_tokens):
            cache.crop(-surplus)


class StageRunner:
    """Computes steps.

    Args:
        units: what computes.
        number: zero-based place of the stage in the chain.
    """

    def __init__(self, units: Units, *, number: int) -> None:
        self._units, self._number = units, number
        self._held: dict[int, Held] = {}
        self._slots = OwnCaches(units.new_cache)
        self._owners: dict[int, int] = {}

    def clear(self) -> None:
        """Forget every sequence."""
        self._held.clear()
        self._slots = OwnCaches(self._units.new_cache)

    def open(self, opening: Opening) -> None:
        """Make room for a sequence."""
        self._held[opening.sequence] = Held(opening, Drawer(opening) if self._units.has_head else None)

    def close(self, sequence: int, *, slot: int, keeps: bool) -> None:
        """Forget a sequence, and its slot's tokens too unless somebody may go on from there."""
        self._held.pop(sequence, None)
        if not keeps and self._owners.get(slot) == sequence:
            self._slots.keep(slot, num_tokens=0)

    def opening(self, sequence: int) -> Opening:
        """Return what was said about a sequence.

        Raises:
            PeerError: it is not open.
        """
        held = self._held.get(sequence)
        if held is None:
            raise PeerError(f"a step for sequence {sequence} came, which is not open", code="E-HEADER")
        return held.opening

    def has(self, sequence: int) -> bool:
        """Whether a sequence is open."""
        return sequence in self._held

    @torch.inference_mode()
    def run(self, parts: Sequence[Part], inputs: torch.Tensor) -> tuple[list[Part], torch.Tensor]:
        """Compute one step.

        Args:
            parts: whose tokens they are.
            inputs: token ids [N], or hidden states [N, E] from the stage before.

        Returns:
            The parts, with a fault where the output is not finite, and hidden states [N, E], or the answers' rows
            [R, W] from the last stage.

        Raises:
            PeerError: a step that is stale, repeated or out of order.
        """
        pieces = torch.split(inputs, [part.count for part in parts])
        outputs = [self._extend(part, piece) for part, piece in zip(parts, pieces, strict=True)]
        checked = [self._checked(part, output) for part, output in zip(parts, outputs, strict=True)]
        if not self._units.has_head:
            return checked, torch.cat(outputs)
        drawers = [drawer for part in parts if (drawer := self._held[part.sequence].drawer) is not None]
        width = width_of(drawers)
        rows = [d.rows(p, logits, width=width) for d, p, logits in zip(drawers, checked, outputs, strict=True)]
        return checked, torch.cat(rows)

    def _extend(self, part: Part, inputs: torch.Tensor) -> torch.Tensor:
        held = self._ready(part)
        keep = part.count if part.gives & PROMPT else 1
        cache = self._slots[held.opening.slot]
        output = self._units.extend(inputs[None], start=part.start, cache=cache, keep=keep)[0]
        held.length = part.end
        return output.to(device="cpu", dtype=torch.float32) if self._units.has_head else output

    def _ready(self, part: Part) -> Held:
        """Return a sequence whose slot ends where the part begins."""
        opening, held = self.opening(part.sequence), self._held[part.sequence]
        if held.length is None:
            held.length, self._owners[opening.slot] = opening.keeps_tokens, part.sequence
            self._slots.keep(opening.slot, num_tokens=held.length)
        if part.start not in (0, held.length):
            raise PeerError(
                f"a step of sequence {part.sequence} begins at token {part.start}",
                expected=f"{held.length}",
                code="E-HEADER",
            )
        if part.start < held.length:  # everything again: see `runtime.reading.families.rope_switch`
            self._slots.keep(opening.slot, num_tokens=0)
        return held

    def _checked(self, part: Part, output: torch.Tensor) -> Part:
        if part.fault or torch.isfinite(output[-1]).all():
            return part
        return replace(part, fault=1 + self._number)
