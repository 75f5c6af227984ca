"""What goes over a link at once: pieces of bytes one after the other, in a buffer of fixed size as far as they fit.

Both ends know the size of every piece, the receiver once it has read those before it. A piece that has no room left is
sent by itself, after the others; whoever has several of them takes them in the same order.

Shapes: B bytes of a buffer or a piece, all uint8.
"""

from collections.abc import Callable, Iterable

import torch

MESSAGE_BYTES = 1 << 18
"""Room for a step of 16 rows of 8,000 numbers in bf16 or fp16. Where there is less, less is sent."""


def pack_pieces(pieces: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return what is sent, each [B]: the message, in which the first piece has room, and the pieces that have none.

    >>> [len(sent) for sent in pack_pieces([torch.zeros(n, dtype=torch.uint8) for n in (2, MESSAGE_BYTES, 3)])]
    [5, 262144]
    """
    together: list[torch.Tensor] = []
    alone: list[torch.Tensor] = []
    room = MESSAGE_BYTES
    for piece in pieces:
        has_room = len(piece) <= room
        (together if has_room else alone).append(piece)
        room -= len(piece) if has_room else 0
    return [torch.cat(together), *alone]


class Pieces:
    """Takes a message apart.

    Args:
        message: the buffer [MESSAGE_BYTES] that it came into.
        receive: returns the next so many bytes that came by themselves.
    """

    def __init__(self, message: torch.Tensor, *, receive: Callable[[int], torch.Tensor]) -> None:
        self._rest, self._receive = message, receive

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return the next piece [B], a copy of what lies in the buffer."""
        if num_bytes > len(self._rest):
            return self._receive(num_bytes)
        piece, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
        return piece.clone()
