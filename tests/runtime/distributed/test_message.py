"""What is taken out of a message is what was put in, wherever it travelled."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.distributed.message import MESSAGE_BYTES, Pieces, pack_pieces

SIZES = st.one_of(st.integers(0, 200), st.integers(MESSAGE_BYTES - 200, MESSAGE_BYTES + 200))


@given(sizes=st.lists(SIZES, max_size=5))
def test_pieces_come_out_as_they_went_in(sizes: list[int]) -> None:
    pieces = [torch.full((size,), number, dtype=torch.uint8) for number, size in enumerate([112, *sizes])]
    message, *alone = pack_pieces(pieces)
    buffer = torch.full((MESSAGE_BYTES,), 99, dtype=torch.uint8)
    buffer[: len(message)] = message
    waiting = iter(alone)
    taken = Pieces(buffer, receive=lambda num_bytes: next(waiting)[:num_bytes])
    assert all(torch.equal(taken.take(len(piece)), piece) for piece in pieces)
    assert next(waiting, None) is None


def test_a_piece_stays_what_it_is_when_the_buffer_is_used_again() -> None:
    buffer = torch.ones(MESSAGE_BYTES, dtype=torch.uint8)
    piece = Pieces(buffer, receive=torch.empty).take(8)
    buffer.zero_()
    assert piece.tolist() == [1] * 8
