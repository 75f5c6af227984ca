"""The driver's end of the chain: steps go to the stages one after the other, and what the last one answers comes back.

Several steps are under way at once, so that no stage waits while there is work. Answers come in the order of the steps.
"""

import itertools
import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from plans.errors import NumericalError
from plans.stages import StageRange
from runtime.distributed.clocks import StageClock
from runtime.distributed.control.faults import Fault, Loss
from runtime.distributed.control.messages import Open
from runtime.distributed.control.team import Team
from runtime.distributed.header import (
    DTYPE_CODES,
    STEP,
    TOKENS,
    Header,
    check_against,
    check_parts,
    closing,
    dtype_code,
)
from runtime.distributed.links import Arrival, Links
from runtime.reading.families import rope_switch
from runtime.stages.stage import Stage
from runtime.steps.choice import read_answers, width_of
from runtime.steps.parts import Answer, Forgotten, Opening, Part
from runtime.steps.runner import StageRunner
from runtime.steps.units import StageUnits, most_slots


@dataclass(frozen=True, slots=True)
class Sent:
    """A step that is under way."""

    step: int
    parts: Sequence[Part]
    openings: Sequence[Opening]


class Pipeline:
    """Steps that go on in other processes; see `runtime.steps.parts.Steps`.

    Args:
        team: the other processes.
        stage: the first stage.
        clock: measures the first stage.
        recover: starts a lost worker again and connects everybody anew.
        stages: of the chain.
        can_be_cut: whether the end of a cache can be taken back.

    Attributes:
        links: connections to the neighbours; replaced after a restart.
        numbers: of sequences; none is used twice.
    """

    def __init__(
        self,
        team: Team,
        stage: Stage,
        clock: StageClock,
        *,
        recover: Callable[[Loss], None],
        stages: Sequence[StageRange],
        can_be_cut: bool,
    ) -> None:
        self._team, self._clock, self._recover = team, clock, recover
        self._runner = StageRunner(StageUnits(stage), number=0)
        self._dtype = dtype_code(stage.model.dtype)
        self._stages, self.depth = stages, len(stages)
        self.rope_switch, self.most_slots = rope_switch(stage.model.config), most_slots(stage.model.config)
        self.can_be_cut = can_be_cut and self.rope_switch is None
        self.numbers = itertools.count()
        self.links: Links | None = None
        self._openings: dict[int, Opening] = {}
        self._sent: deque[Sent] = deque()
        self._unannounced: deque[Sent] = deque()
        self._num_sent = 0

    @property
    def has_room(self) -> bool:
        """Whether one more step can be sent now."""
        return len(self._sent) < self.depth

    def open(self, opening: Opening) -> None:
        """Make room for a sequence on every stage."""
        self._openings[opening.sequence] = opening
        self._runner.open(opening.for_others())
        for rank, member in self._team.members.items():
            is_last = rank == self.depth - 1
            member.channel.try_send(Open(opening=opening if is_last else opening.for_others()))

    def close(self, sequence: int, *, slot: int, keeps: bool) -> None:
        """Forget a sequence on every stage, and its slot's tokens too unless somebody may go on from there."""
        self._openings.pop(sequence, None)
        self._runner.close(sequence, slot=slot, keeps=keeps)
        if self.links is not None:
            self.links.send(closing(sequence, slot=slot, keeps=keeps, sender=0), [], torch.empty(0))

    def send(self, parts: Sequence[Part], token_ids: Sequence[int]) -> None:
        """Compute the first stage of a step, and send it on.

        Raises:
            LlamaplanError: the run cannot go on.
        """
        self._team.faults.check()
        sent = Sent(self._num_sent, parts, [self._openings[part.sequence] for part in parts])
        is_prefill = self._runner.is_prefill(parts)
        with self._clock.step(sequence=parts[0].sequence, step=self._num_sent, is_prefill=is_prefill, hop_seconds=0.0):
            checked, outputs = self._runner.run(parts, torch.tensor(token_ids, dtype=torch.int64))
        rows, width = outputs.shape
        header = Header(STEP, 0, self._num_sent, len(parts), rows, width, self._dtype)
        assert self.links is not None
        self._sent.append(sent)
        self._unannounced.append(sent)
        self._num_sent += 1
        self.links.send(header, checked, outputs)

    def take(self, *, waits: bool) -> list[Answer] | None:
        """Return the answers of a step that came back; None if there are none, after `wake` if it waits.

        Raises:
            LlamaplanError: the run cannot go on.
            Forgotten: a worker was started again.
        """
        while True:
            try:
                event = self._team.faults.events.get(block=waits)
            except queue.Empty:
                return None
            if isinstance(event, Fault):
                self._team.faults.check()
            if isinstance(event, Loss):
                self._recover(event)
                raise Forgotten
            if isinstance(event, Arrival):
                sent = self._sent.popleft()
                return read_answers(event.parts, event.payload, sent.openings)
            if waits:
                return None

    def wake(self) -> None:
        """Let `take` return; from any thread."""
        self._team.faults.events.put(None)

    def explain(self, part: Part, token_ids: Sequence[int], *, step: int) -> NumericalError:  # noqa: ARG002
        """Return which stage's output was not finite."""
        spec = self._stages[part.fault - 1]
        when = f"step {step}" if step > 0 else "reading the prompt"
        return NumericalError(
            f"{when}: NaN or infinity in stage {part.fault - 1} ({spec.words}) on {spec.device}",
            hint="try --dtype fp32, or check the weights with llamaplan verify",
            code="E-NONFINITE",
        )

    def expect(self, header: Header, parts: Sequence[Part]) -> None:
        """Check an announced answer against the step that is the next to come back; runs in the receiving thread.

        Raises:
            PeerError: not what must come next.
        """
        sent = self._unannounced.popleft() if self._unannounced else Sent(-1, (), ())
        check_against(header, kind=TOKENS, sender=self.depth - 1, step=sent.step, dtype=DTYPE_CODES["int64"])
        check_against(header, width=width_of(sent.openings))
        check_parts(parts, sent.parts)

    def start_over(self) -> None:
        """Forget everything, as the stages have: whoever sends steps sends them again."""
        self._sent.clear()
        self._unannounced.clear()
        self._openings.clear()
        self._num_sent = 0
        self._runner.clear()
        while not self._team.faults.events.empty():  # answers from before
            self._team.faults.events.get()
        self._team.faults.check()
