"""The end of a step at the head: from logits to tokens, and how likely they were.

Shapes: V vocabulary, R rows of an answer, W numbers per row.
"""

import itertools
from collections.abc import Iterable, Sequence

import torch

from plans.errors import NumericalError
from runtime.generate.rules import Ending
from runtime.generate.token_chooser import TokenChooser, nothing_left
from runtime.steps.parts import PROMPT, TOKEN, Answer, Likely, Opening, Part

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
        self._length = opening.num_prompt_tokens

    def rows(self, part: Part, logits: torch.Tensor, *, width: int) -> torch.Tensor:
        """Return the rows of a part's answer: int64 [R, W].

        Args:
            part: what was computed.
            logits: fp32 [R, V], in the order of the tokens; with `PROMPT` and `TOKEN` the last row counts for both.
            width: W.
        """
        rows = torch.zeros((part.num_rows, width), dtype=torch.int64)
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
            token = int(logits.numpy().argmax())  # takes a tenth of the time of torch's
        else:
            try:
                token = self._chooser.choose(logits, token_ids=self._ids[: self._length])
            except NumericalError:
                return NOTHING
        self._ids[self._length] = token
        self._length += 1
        return token

    def _describe(self, logits: torch.Tensor, token_ids: torch.Tensor, rows: torch.Tensor) -> None:
        rows[: len(token_ids), 0] = token_ids
        if self.drawing.num_top is None:
            return
        for row, scores, token in zip(rows, logits, token_ids, strict=False):  # one at a time: V may be large
            likely = torch.log_softmax(scores, dim=-1).double()
            row[1] = likely[token].view(torch.int64)
            top = likely.topk(self.drawing.num_top)
            row[2 : 2 + 2 * len(top.indices)] = torch.stack((top.indices, top.values.view(torch.int64)), dim=1).view(-1)


def width_of(openings: Iterable[Opening]) -> int:
    """Return W, the numbers per row, of a step of these sequences."""
    return max(opening.drawing.width for opening in openings if opening.drawing is not None)


def read_answers(parts: Sequence[Part], rows: torch.Tensor, openings: Sequence[Opening]) -> list[Answer]:
    """Return what rows [R, W] of all parts, one after the other, say; the opposite of `Drawer.rows`."""
    ends = itertools.accumulate(part.num_rows for part in parts)
    return [
        _answer(part, rows[end - part.num_rows : end], opening)
        for part, opening, end in zip(parts, openings, ends, strict=True)
    ]


def _answer(part: Part, rows: torch.Tensor, opening: Opening) -> Answer:
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


def _likely(row: torch.Tensor, num_top: int) -> Likely:
    numbers = row.view(torch.float64).tolist()
    ids = row.tolist()
    top = tuple((ids[at], numbers[at + 1]) for at in range(2, 2 + 2 * num_top, 2))
    return Likely(ids[0], numbers[1], top)
