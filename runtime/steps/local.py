"""Steps in this process: computed where they are sent."""

import itertools
import queue
from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from plans.errors import NumericalError
from runtime.generate.numerics import NonFiniteError, find_stage
from runtime.reading.families import rope_switch
from runtime.stages.chain import Chain
from runtime.steps.choice import read_answers
from runtime.steps.parts import Answer, Opening, Part
from runtime.steps.runner import StageRunner
from runtime.steps.units import ChainUnits, most_slots


class LocalSteps:
    """The steps of a chain; see `runtime.steps.parts.Steps`."""

    depth, has_room = 1, True

    def __init__(self, chain: Chain) -> None:
        """Take the chain; whoever drives these steps owns it."""
        self._chain = chain
        self._runner = StageRunner(ChainUnits(chain), number=0)
        self._done: queue.SimpleQueue[list[Answer] | None] = queue.SimpleQueue()
        self.rope_switch, self.most_slots = rope_switch(chain.config), most_slots(chain.config)
        has_windows = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in chain.new_cache().layers)
        self.can_be_cut = not has_windows and self.rope_switch is None
        self.numbers = itertools.count()

    def open(self, opening: Opening) -> None:
        """Make room for a sequence."""
        self._runner.open(opening)

    def close(self, sequence: int, *, slot: int, keeps: bool) -> None:
        """Forget a sequence, and its slot's tokens too unless somebody may go on from there."""
        self._runner.close(sequence, slot=slot, keeps=keeps)

    def send(self, parts: Sequence[Part], token_ids: Sequence[int]) -> None:
        """Compute a step."""
        checked, rows = self._runner.run(parts, torch.tensor(token_ids, dtype=torch.int64))
        self._done.put(read_answers(checked, rows, [self._runner.opening(part.sequence) for part in parts]))

    def take(self, *, waits: bool) -> list[Answer] | None:
        """Return the answers of a step; None if there are none, after `wake` if it waits."""
        try:
            while (found := self._done.get(block=waits)) is None and not waits:
                pass
        except queue.Empty:
            return None
        return found

    def wake(self) -> None:
        """Let `take` return; from any thread."""
        self._done.put(None)

    def explain(self, part: Part, token_ids: Sequence[int], *, step: int) -> NumericalError:  # noqa: ARG002
        """Return which stage's output is not finite, by computing the sequence again."""
        with torch.inference_mode():
            stage = find_stage(self._chain, token_ids)
        return NonFiniteError(self._chain, stage=stage, step=step)
