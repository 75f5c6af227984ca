"""The token ids of a batch, padded on the left, with room for what will be generated."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig


class TokenBatch:
    """Token ids, mask and positions of B sequences, kept on the CPU.

    Args:
        prompts: token ids per sequence, none of them empty.
        num_new_tokens: room for new tokens per sequence.
        pad_token_id: fills the left side of shorter prompts.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], *, num_new_tokens: int, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id
        self.length = max(map(len, prompts))
        self.num_padding = tuple(self.length - len(prompt) for prompt in prompts)
        capacity = self.length + num_new_tokens
        self._ids = torch.full((len(prompts), capacity), pad_token_id, dtype=torch.long)  # [B, capacity]
        for row, (prompt, padding) in enumerate(zip(prompts, self.num_padding, strict=True)):
            self._ids[row, padding : self.length] = torch.tensor(prompt, dtype=torch.long)
        start = torch.tensor(self.num_padding)[:, None]  # [B, 1]
        columns = torch.arange(capacity)[None]  # [1, capacity]
        self._positions = (columns - start).clamp(min=0)
        # Without padding there is no mask at all, as in generate(): a mask would select another attention kernel.
        self._mask = (columns >= start).long() if any(self.num_padding) else None

    def ids(self, start: int, end: int) -> torch.Tensor:
        """Return the token ids [B, end - start] of a range of columns."""
        return self._ids[:, start:end]

    def positions(self, start: int, end: int) -> torch.Tensor:
        """Return the positions [B, end - start]; 0 where padded."""
        return self._positions[:, start:end]

    def mask(self, end: int) -> torch.Tensor | None:
        """Return the padding mask [B, end], or None when nothing is padded."""
        return None if self._mask is None else self._mask[:, :end]

    def sequence(self, row: int) -> torch.Tensor:
        """Return the ids [T] of one sequence so far, without padding."""
        return self._ids[row, self.num_padding[row] : self.length]

    def append(self, tokens: Sequence[int]) -> None:
        """Add one column of B tokens."""
        self._ids[:, self.length] = torch.tensor(tokens, dtype=torch.long)
        self.length += 1


def padding_token(config: GenerationConfig, *, vocab_size: int) -> int:
    """Return the id that fills shorter prompts: the checkpoint's, or any where it has none that the model knows."""
    stated = config.pad_token_id
    return stated if isinstance(stated, int) and 0 <= stated < vocab_size else 0
