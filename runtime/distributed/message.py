"""What goes over a link at once: pieces of bytes one after the other, in a buffer of fixed size as far as they fit.

Both ends know the size of every piece, the receiver once it has read those before it. A piece that has no room left is
sent by itself, after the others; whoever has several of them takes them in the same order.

Bytes are handled without torch as far as they can be: after a step none of its code lies in a cache.
"""

import math
import struct
from collections.abc import Callable, Iterable, Sequence

import torch

MESSAGE_BYTES = 1 << 18
"""Room for a step of 16 rows of 8,000 numbers in bf16 or fp16. Where there is less, less is sent."""

WORD_BYTES = 8


Piece = bytearray | memoryview


def words_piece(words: Sequence[int]) -> Piece:
    """Return numbers of 64 bits as a piece."""
    return bytearray(struct.pack(f"={len(words)}q", *words))


def tensor_piece(tensor: torch.Tensor) -> Piece:
    """Return the numbers of a contiguous tensor on the CPU as a piece, which is the same memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def pack_pieces(pieces: Iterable[Piece]) -> list[torch.Tensor]:
    """Return what is sent, all uint8: the message, in which the first piece has room, and the pieces that have none.

    >>> [len(sent) for sent in pack_pieces(map(words_piece, ([1, 2], [3] * MESSAGE_BYTES, [4])))]
    [24, 2097152]
    """
    message = bytearray()
    alone: list[Piece] = []
    for piece in pieces:
        if len(message) + len(piece) <= MESSAGE_BYTES:
            message += piece
        else:
            alone.append(piece)
    return [torch.frombuffer(sent, dtype=torch.uint8) for sent in (message, *alone)]


class Pieces:
    """Takes a message apart.

    Args:
        message: the buffer of MESSAGE_BYTES that it came into.
        receive: returns the next so many bytes that came by themselves.
    """

    def __init__(self, message: bytearray, *, receive: Callable[[int], bytearray]) -> None:
        self._message, self._receive, self._end = message, receive, 0

    def words(self, count: int) -> tuple[int, ...]:
        """Return the next piece as so many numbers of 64 bits."""
        return struct.unpack_from(f"={count}q", *self._take(count * WORD_BYTES))

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the next piece as a tensor of its own."""
        if not (count := math.prod(shape)):
            return torch.empty(tuple(shape), dtype=dtype)
        source, start = self._take(count * dtype.itemsize)
        return torch.frombuffer(source, dtype=dtype, count=count, offset=start).view(tuple(shape)).clone()

    def _take(self, num_bytes: int) -> tuple[bytearray, int]:
        """Return where the next piece lies, and from which byte on."""
        start, end = self._end, self._end + num_bytes
        if end > MESSAGE_BYTES:
            return self._receive(num_bytes), 0
        self._end = end
        return self._message, start
