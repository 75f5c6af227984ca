"""What is taken out of a message is what was put in, wherever it travelled."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.distributed.message import MESSAGE_BYTES, WORD_BYTES, Pieces, pack_pieces, tensor_piece, words_piece

ROOM = MESSAGE_BYTES // WORD_BYTES
COUNTS = st.one_of(st.integers(0, 25), st.integers(ROOM - 25, ROOM + 25))


@given(num_words=COUNTS, num_rows=COUNTS, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
def test_pieces_come_out_as_they_went_in(num_words: int, num_rows: int, dtype: torch.dtype) -> None:
    words, tensor = range(num_words), torch.arange(3 * num_rows).to(dtype).view(num_rows, 3)
    message, *alone = pack_pieces([words_piece([5, -6]), words_piece(words), tensor_piece(tensor)])
    buffer = bytearray(message.numpy().tobytes().ljust(MESSAGE_BYTES, b"?"))
    assert len(buffer) == MESSAGE_BYTES
    waiting = iter(alone)
    taken = Pieces(buffer, receive=lambda num_bytes: bytearray(next(waiting).numpy().tobytes()[:num_bytes]))
    assert taken.words(2) == (5, -6)
    assert taken.words(num_words) == tuple(words)
    assert torch.equal(taken.tensor(tensor.shape, dtype), tensor)
    assert next(waiting, None) is None


def test_a_tensor_stays_what_it_is_when_the_buffer_is_used_again() -> None:
    buffer = bytearray([1]) * MESSAGE_BYTES
    taken = Pieces(buffer, receive=bytearray).tensor((1, 2), torch.int64)
    buffer[:] = bytes(MESSAGE_BYTES)
    assert taken.tolist() == [[0x0101010101010101] * 2]
