"""Who is in the next step: a piece of one prompt, or the newest token of everybody who has one."""

from collections.abc import Iterable
from itertools import count

from plans.workload import may_read_on
from runtime.engine.sequence import Sequence


class Turns:
    """Decides what the next step is made of.

    Prompts are read one after the other, the oldest first. After a piece or two it is the turn of those whose newest
    token is there; where all of them are still under way, another piece fills the chain meanwhile.

    Args:
        depth: steps that can be under way at once; those who decode are shared out among so many.
        reads_first: whether nobody decodes while there is a prompt to read.
    """

    def __init__(self, *, depth: int, reads_first: bool) -> None:
        self._depth, self._reads_first = depth, reads_first
        self._read: list[int] = []
        self._sent = count()

    def next(self, running: Iterable[Sequence]) -> list[Sequence]:
        """Return whose parts go into the next step; nobody's if all wait for answers."""
        everybody = list(running)
        reading = [sequence for sequence in everybody if sequence.is_reading]
        decoding = [sequence for sequence in everybody if not sequence.is_reading]
        ready = sorted((s for s in decoding if s.is_ready), key=lambda sequence: sequence.turn)
        if reading and (self._reads_first or not ready or may_read_on(self._read, reading[0].num_next_tokens)):
            self._read.append(reading[0].num_next_tokens)
            return reading[:1]
        chosen = ready[: -(-len(decoding) // self._depth)]
        if chosen:
            self._read.clear()
        for sequence in chosen:
            sequence.turn = next(self._sent)
        return chosen
