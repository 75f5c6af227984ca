"""What one stage keeps per sequence, and how it computes a step. The same in one process and in several.

Shapes: N tokens of a step, E hidden size, V vocabulary, R rows of an answer, W numbers per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from transformers.cache_utils import Cache

from plans.errors import PeerError
from runtime.fast.slots import SlotCache
from runtime.reading.devices import one_thread
from runtime.steps.choice import Drawer, width_of
from runtime.steps.largest import is_finite
from runtime.steps.parts import PROMPT, Opening, Part
from runtime.steps.units import Caches, OwnCaches


class Units(Protocol):
    """What is computed here: the whole model, or one stage of it."""

    has_head: bool

    def new_slots(self, *, num_slots: int, capacity: int) -> Caches:
        """Return empty caches for so many sequences."""

    def extend_each(self, inputs: torch.Tensor, *, slots: Sequence[int], cache: SlotCache) -> torch.Tensor:
        """Run a token id [R] or hidden state [R, E] of each of several sequences; returns [R, E], or logits [R, V]."""

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


class StageRunner:
    """Computes steps.

    Args:
        units: what computes.
        number: zero-based place of the stage in the chain.

    Attributes:
        slots: the caches.
    """

    def __init__(self, units: Units, *, number: int) -> None:
        self._units, self._number = units, number
        self._held: dict[int, Held] = {}
        self._sizes = (0, 0)
        self.slots: Caches = OwnCaches(lambda: None)

    def clear(self) -> None:
        """Forget every sequence."""
        self._held.clear()
        self._sizes, self.slots = (0, 0), OwnCaches(lambda: None)

    def open(self, opening: Opening) -> None:
        """Make room for a sequence."""
        self._held[opening.sequence] = Held(opening, Drawer(opening) if self._units.has_head else None)

    def close(self, sequence: int, *, slot: int, keeps: bool) -> None:
        """Forget a sequence, and its slot's tokens too unless somebody may go on from there."""
        self._held.pop(sequence, None)
        if not keeps and slot < self._sizes[0]:
            self.slots.release(slot)

    def make_slots(self, *, num_slots: int, capacity: int) -> None:
        """Have caches of these sizes, unless they are there; what an earlier engine kept is lost."""
        if self._sizes != (num_slots, capacity):
            self._sizes, self.slots = (num_slots, capacity), OwnCaches(lambda: None)
            self.slots = self._units.new_slots(num_slots=num_slots, capacity=capacity)

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

    def is_prefill(self, parts: Sequence[Part]) -> bool:
        """Whether a step reads a prompt."""
        return any(part.start < self.opening(part.sequence).num_prompt_tokens for part in parts)

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
        last = self._extend_each(parts, inputs)  # [parts, E or V]
        if last is None:
            pieces = torch.split(inputs, [part.count for part in parts])
            outputs = list(map(self._extend, parts, pieces))
        with one_thread():
            if last is not None:
                last = self._moved(last)
                outputs = list(last[:, None])
            is_well = last is not None and is_finite(last)
            checked = list(parts) if is_well else list(map(self._checked, parts, outputs))
            return self._answers(checked, outputs)

    def _answers(self, checked: list[Part], outputs: Sequence[torch.Tensor]) -> tuple[list[Part], torch.Tensor]:
        """Choose tokens."""
        if not self._units.has_head:
            return checked, torch.cat(tuple(outputs))
        width = width_of(self.opening(part.sequence) for part in checked)
        drawers = [drawer for part in checked if (drawer := self._held[part.sequence].drawer) is not None]
        rows = [d.rows(p, logits, width=width) for d, p, logits in zip(drawers, checked, outputs, strict=True)]
        return checked, torch.from_numpy(np.concatenate(rows))

    def _extend_each(self, parts: Sequence[Part], inputs: torch.Tensor) -> torch.Tensor | None:
        """Run the newest tokens of several sequences together; None if that is not what the parts are, or can be.

        Which way a part goes does not depend on what else is in the step.
        """
        held = [self._ready(part) for part in parts]
        cache, is_decoding = self.slots, not self.is_prefill(parts)
        if not isinstance(cache, SlotCache) or not is_decoding or any(part.start == 0 for part in parts):
            return None
        outputs = self._units.extend_each(inputs, slots=[one.opening.slot for one in held], cache=cache)
        for one, part in zip(held, parts, strict=True):
            one.length = part.end
        return outputs

    def _moved(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.to("cpu") if self._units.has_head else outputs

    def _extend(self, part: Part, inputs: torch.Tensor) -> torch.Tensor:
        held = self._held[part.sequence]
        keep = part.count if part.gives & PROMPT else 1
        cache = self.slots[held.opening.slot]
        output = self._units.extend(inputs[None], start=part.start, cache=cache, keep=keep)[0]
        held.length = part.end
        return self._moved(output)

    def _ready(self, part: Part) -> Held:
        """Return a sequence whose slot ends where the part begins."""
        opening, held = self.opening(part.sequence), self._held[part.sequence]
        self.make_slots(num_slots=opening.num_slots, capacity=opening.capacity)
        if held.length is None:
            held.length = opening.keeps_tokens
            self.slots.keep(opening.slot, num_tokens=held.length)
        if part.start not in (0, held.length):
            raise PeerError(
                f"a step of sequence {part.sequence} begins at token {part.start}",
                expected=f"{held.length}",
                code="E-HEADER",
            )
        if part.start < held.length:  # everything again: see `runtime.reading.families.rope_switch`
            self.slots.keep(opening.slot, num_tokens=0)
        return held

    def _checked(self, part: Part, output: torch.Tensor) -> Part:
        return part if part.fault or is_finite(output[-1]) else replace(part, fault=1 + self._number)
