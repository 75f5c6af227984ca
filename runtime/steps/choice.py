"""The end of a step at the head: from logits to tokens, and how likely they were.

Shapes: V vocabulary, R rows of an answer, W numbers per row.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from plans.errors import NumericalError
from runtime.generate.rules import Ending
from runtime.generate.token_chooser import TokenChooser, nothing_left
from runtime.steps.largest import largest
from runtime.steps.parts import PROMPT, TOKEN, Answer, Likely, Opening, Part

Rows = NDArray[np.int64]
"""[R, W]"""

NOTHING = -1
"""In the place of a token: none could be chosen."""


class Drawer:
    """Chooses the tokens of one sequence and remembers them, as far as choices depend on them."""

    def __init__(self, opening: Opening) -> None:
        """Take what was said about the sequence, drawing included."""
        assert opening.drawing is not None
        drawing = self.drawing = opening.drawing
        ending = Ending(max_length=drawing.max_length, eos_token_ids=drawing.eos_token_ids)
        self._chooser = TokenChooser(drawing.sampling(), sequence_index=drawing.sequence_index, ending=ending)
        self._ids = torch.zeros(max(opening.num_tokens, opening.num_prompt_tokens) + 1, dtype=torch.int64)
        self._ids[: len(opening.prompt_ids)] = torch.tensor(opening.prompt_ids, dtype=torch.int64)
        self._ids_in_numpy = self._ids.numpy()  # the same memory, quicker to write to
        self._length = opening.num_prompt_tokens

    def rows(self, part: Part, logits: torch.Tensor, *, width: int) -> Rows:
        """Return the rows of a part's answer.

        Args:
            part: what was computed.
            logits: [R, V] on the CPU, in the order of the tokens; with `PROMPT` and `TOKEN` the last row counts for
                both.
            width: W.
        """
        rows = np.zeros((part.num_rows, width), np.int64)
        if part.gives & PROMPT:
            self._describe(logits, self._ids[part.start + 1 : part.end + 1], rows)
        if part.gives & TOKEN and not part.fault:
            token = self._choose(logits[-1])
            if self.drawing.num_top is not None:
                self._describe(logits[-1:], torch.tensor([max(token, 0)]), rows[-1:])
            rows[-1, 0] = token
        return rows

    def _choose(self, logits: torch.Tensor) -> int:
        if self._chooser.is_plain_argmax:
            token = largest(logits)
        else:
            try:
                token = self._chooser.choose(logits.float(), token_ids=self._ids[: self._length])
            except NumericalError:
                return NOTHING
        self._ids_in_numpy[self._length] = token
        self._length += 1
        return token

    def _describe(self, logits: torch.Tensor, token_ids: torch.Tensor, numbers: Rows) -> None:
        rows = torch.from_numpy(numbers)
        rows[: len(token_ids), 0] = token_ids
        if self.drawing.num_top is None:
            return
        for row, scores, token in zip(rows, logits, token_ids, strict=False):  # one at a time: V may be large
            likely = torch.log_softmax(scores.float(), dim=-1).double()
            row[1] = likely[token].view(torch.int64)
            top = likely.topk(self.drawing.num_top)
            row[2 : 2 + 2 * len(top.indices)] = torch.stack((top.indices, top.values.view(torch.int64)), dim=1).view(-1)


def width_of(openings: Iterable[Opening]) -> int:
    """Return W, the numbers per row, of a step of these sequences."""
    return max(opening.drawing.width for opening in openings if opening.drawing is not None)


def read_answers(parts: Sequence[Part], rows: torch.Tensor, openings: Sequence[Opening]) -> list[Answer]:
    """Return what rows int64 [R, W] of all parts, one after the other, say; the opposite of `Drawer.rows`."""
    ends, numbers = itertools.accumulate(part.num_rows for part in parts), rows.numpy()
    return [
        _answer(part, numbers[end - part.num_rows : end], opening)
        for part, opening, end in zip(parts, openings, ends, strict=True)
    ]


def _answer(part: Part, rows: Rows, opening: Opening) -> Answer:
    assert opening.drawing is not None
    num_top = opening.drawing.num_top
    likely = [] if num_top is None else [_likely(row, num_top) for row in rows]
    prompt = tuple(likely[: min(part.count, opening.num_prompt_tokens - part.start - 1)]) if part.gives & PROMPT else ()
    if not part.gives & TOKEN or part.fault:
        return Answer(part, prompt=prompt)
    token = int(rows[-1, 0])
    if token == NOTHING:
        return Answer(part, prompt=prompt, error=nothing_left(opening.drawing.sampling()))
    return Answer(part, token, likely[-1] if likely else None, prompt)


def _likely(row: NDArray[np.int64], num_top: int) -> Likely:
    numbers: list[Any] = row.view(np.float64).tolist()
    ids = row.tolist()
    top = tuple((ids[at], numbers[at + 1]) for at in range(2, 2 + 2 * num_top, 2))
    return Likely(ids[0], numbers[1], top)
