"""Stop strings as `generate()` finds them: spelled by the tokenizer's tokens, special ones and the prompt included."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from plans.errors import InputError, printable


class TokenStops:
    """Whether a sequence has just ended with one of the stop strings, or somewhere inside its last token.

    Args:
        tokenizer: spells the tokens.
        stop_strings: none of them empty.
        where: the file they come from.

    Raises:
        InputError: no tokens spell one of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str], *, where: object) -> None:
        try:
            self._criteria = StopStringCriteria(tokenizer, list(stop_strings))
        except ValueError:
            shown = ", ".join(printable(repr(text), limit=40) for text in stop_strings)
            raise InputError(
                f"no tokens spell one of {shown}", where=f"{where}:/stop_strings", code="E-CONFIG"
            ) from None

    def __call__(self, token_ids: Sequence[int]) -> bool:
        """Look at the end of a sequence, prompt included."""
        tail = torch.tensor([token_ids[-self._criteria.maximum_token_len :]])
        return bool(self._criteria(tail, None)[0])
