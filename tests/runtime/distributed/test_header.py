"""Nothing reaches a buffer that was not announced, checked and expected."""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed.distributed_c10d as c10d
from hypothesis import example, given
from hypothesis import strategies as st

from plans.errors import PeerError
from runtime.distributed.control.messages import Beat, Open, decode, encode
from runtime.distributed.control.store import SharedStore
from runtime.distributed.header import (
    NUM_WORDS,
    PART_WORDS,
    STEP,
    TOKENS,
    Header,
    Stamp,
    check_against,
    check_parts,
    checksum,
    closing,
    pack,
    read_table,
    unpack,
    write_table,
)
from runtime.distributed.links import MAX_WAITING_MESSAGES, Links, Place, _connect
from runtime.distributed.message import MESSAGE_BYTES
from runtime.generate.limits import Limits
from runtime.generate.request import Request
from runtime.generate.sampling import Sampling
from runtime.steps.parts import TOKEN, Part, opening_of

pytestmark = pytest.mark.row("N10")

STAMP = Stamp.of("ab" * 32, epoch=3)
PARTS = [Part(4, 7, 1, TOKEN), Part(9, 0, 5, 0)]
TABLE = write_table(PARTS)
HEADER = Header(STEP, 0, 2, 2, 6, 8, 1, checksum(TABLE))
WORDS = st.integers(min_value=-(2**63), max_value=2**63 - 1)


def test_a_header_says_what_was_packed() -> None:
    assert unpack(pack(HEADER, STAMP), STAMP) == HEADER
    assert HEADER.payload_bytes == 6 * 8 * 4


@example(place=6, word=2**63 - 2)  # the same but for a multiple of the checksum's modulus
@example(place=6, word=2 - (2**61 - 1))
@given(place=st.integers(min_value=0, max_value=NUM_WORDS - 1), word=WORDS)
def test_a_header_with_any_other_word_is_refused(place: int, word: int) -> None:
    words = pack(HEADER, STAMP)
    if words[place] != word:
        words[place] = word
        with pytest.raises(PeerError):
            unpack(words, STAMP)


@given(words=st.lists(WORDS, min_size=NUM_WORDS, max_size=NUM_WORDS))
def test_random_words_are_refused(words: list[int]) -> None:
    with pytest.raises(PeerError):
        unpack(words, STAMP)


@pytest.mark.parametrize("stamp", [Stamp.of("ab" * 32, epoch=2), Stamp.of("cd" * 32, epoch=3)])
def test_a_header_of_another_epoch_or_export_is_refused(stamp: Stamp) -> None:
    with pytest.raises(PeerError):
        unpack(pack(HEADER, stamp), STAMP)


@pytest.mark.parametrize(
    ("name", "value"), [("step", 1), ("step", 3), ("parts", 1), ("rows", 1), ("width", 4), ("dtype", 2), ("sender", 2)]
)
def test_a_stale_repeated_or_foreign_step_is_refused(name: str, value: int) -> None:
    with pytest.raises(PeerError, match=name):
        check_against(replace(HEADER, **{name: value}), **{name: getattr(HEADER, name)})


def test_a_huge_or_empty_payload_is_refused() -> None:
    for shape in ({"parts": 0}, {"rows": -1}, {"width": 0}, {"parts": 1 << 30}, {"rows": 1 << 20, "width": 1 << 20}):
        with pytest.raises(PeerError):
            unpack(pack(replace(HEADER, **shape), STAMP), STAMP)


def test_a_table_says_what_was_written() -> None:
    assert read_table(HEADER, TABLE) == PARTS


@pytest.mark.parametrize(("row", "word", "value"), [(0, 1, 8), (0, 2, 0), (1, 2, -5), (1, 3, 4), (1, 0, 4), (1, 2, 6)])
def test_a_table_with_any_other_word_is_refused(row: int, word: int, value: int) -> None:
    """Also where its checksum says otherwise: a count below 1, an unknown wish, a sequence twice, too many tokens."""
    table = list(TABLE)
    table[row * PART_WORDS + word] = value
    with pytest.raises(PeerError):
        read_table(HEADER, table)
    if (row, word) != (0, 1):
        with pytest.raises(PeerError):
            read_table(replace(HEADER, table=checksum(table)), table)


def test_an_answer_to_another_step_is_refused() -> None:
    check_parts([replace(PARTS[0], fault=2), PARTS[1]], PARTS)
    for other in ([PARTS[0]], [replace(PARTS[0], start=8), PARTS[1]], [replace(PARTS[0], sequence=5), PARTS[1]]):
        with pytest.raises(PeerError, match="parts"):
            check_parts(other, PARTS)


@given(data=st.binary(max_size=300))
def test_random_bytes_are_no_control_message(data: bytes) -> None:
    with pytest.raises(PeerError):
        decode(data)


@pytest.mark.parametrize(
    "data", [b'{"kind":"beat","more":1}', b'{"kind":"open"}', b'{"kind":"beat","kind":"beat"}', b'["beat"]', b"{}"]
)
def test_a_message_that_is_not_quite_one_of_ours_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        decode(data)


def test_a_message_survives_the_way() -> None:
    request = Request(
        prompt_ids=[1, 2, 3],
        sampling=Sampling(temperature=0.5, logit_bias={7: -1.5}, rules={"no_repeat_ngram_size": 2}),
        limits=Limits(context_tokens=9),
        num_top=3,
    )
    opening = Open(opening=opening_of(request, sequence=1, slot=0, num_tokens=5, num_slots=2, capacity=9))
    assert decode(encode(opening)) == opening
    assert decode(encode(Beat())) == Beat()


class Pair:
    """Real links of rank 1, and a bare end of link 0 as a rank 0 that sends what it likes."""

    def __init__(self) -> None:
        self.inbox: queue.Queue[Any] = queue.Queue()
        self.reports: queue.Queue[Exception] = queue.Queue()
        stores = [SharedStore(lambda _entry: None, has_ended=lambda: False) for _ in range(2)]
        stores[0]._publish, stores[1]._publish = stores[1].receive, stores[0].receive
        places = [
            Place(rank=rank, num_ranks=2, address="127.0.0.1", device=torch.device("cpu"), uses_nccl=False)
            for rank in range(2)
        ]
        made: list[Any] = []
        linked: list[int] = []
        prefixed = c10d.PrefixStore(f"epoch{STAMP.epoch}", stores[0])
        helper = threading.Thread(target=lambda: made.append(_connect(places[0], prefixed, lambda _link: None)))
        helper.start()
        self.links = Links(
            places[1],
            stores[1],
            stamp=STAMP,
            on_linked=linked.append,
            expect=lambda header, _parts: check_against(header, kind=STEP, parts=2, width=8),
            inbox=self.inbox,
            report=lambda _peer, error: self.reports.put(error),
        )
        helper.join()
        self.ends = made[0]
        self.evil = self.ends[0].group
        assert linked == [0, 1]

    def send(self, words: list[int], table: list[int], *payload: torch.Tensor) -> None:
        numbers = torch.tensor([*words, *table])
        self.evil.send([torch.cat([tensor.view(-1).view(torch.uint8) for tensor in (numbers, *payload)])], 1, 0).wait()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.links.close()


def test_real_links_take_what_is_announced_and_refuse_the_rest(pair: Pair) -> None:
    payload = torch.arange(48.0).reshape(6, 8)
    pair.send(pack(HEADER, STAMP), TABLE, payload)
    arrived = pair.inbox.get(timeout=20)
    assert torch.equal(arrived.payload, payload)
    assert arrived.parts == PARTS
    assert pair.links.counts().received == 1
    assert pair.links.counts().received_bytes > 8 * NUM_WORDS + payload.nbytes
    pair.send(pack(replace(HEADER, kind=TOKENS, rows=1), STAMP), TABLE)
    assert "kind" in str(pair.reports.get(timeout=20))
    assert pair.inbox.empty()


def test_a_payload_without_room_comes_by_itself_and_steps_stay_in_order(pair: Pair) -> None:
    long = [PARTS[0], replace(PARTS[1], count=MESSAGE_BYTES // 32)]
    table = write_table(long)
    header = replace(HEADER, rows=1 + long[1].count, table=checksum(table))
    payload = torch.arange(8.0 * header.rows).reshape(header.rows, 8)
    for number in range(6):  # more than there are buffers
        pair.send(pack(replace(HEADER, step=2 * number), STAMP), TABLE, payload[:6] + number)
        pair.send(pack(replace(header, step=2 * number + 1), STAMP), table)
        pair.evil.send([payload + number], 1, 1).wait()
    for number in range(6):
        short, whole = pair.inbox.get(timeout=20), pair.inbox.get(timeout=20)
        assert (short.header.step, whole.header.step) == (2 * number, 2 * number + 1)
        assert torch.equal(short.payload, payload[:6] + number)
        assert torch.equal(whole.payload, payload + number)
        assert whole.parts == long


@pytest.mark.parametrize("length", [1, 8 * NUM_WORDS - 1])
def test_a_message_too_short_for_a_header_is_refused_and_no_earlier_one_is_read_again(pair: Pair, length: int) -> None:
    for step in range(2 * MAX_WAITING_MESSAGES):  # every buffer has held a good one
        pair.send(pack(replace(HEADER, step=step), STAMP), TABLE, torch.zeros(6, 8))
        assert pair.inbox.get(timeout=20).header.step == step
    words = torch.tensor(pack(HEADER, STAMP)).view(torch.uint8)
    pair.evil.send([words[:length].clone()], 1, 0).wait()
    pair.reports.get(timeout=20)
    assert pair.inbox.empty()


def test_a_table_that_does_not_fit_its_header_is_refused_before_its_payload_is_waited_for(pair: Pair) -> None:
    pair.send(pack(replace(HEADER, rows=MESSAGE_BYTES), STAMP), TABLE)
    assert "rows" in str(pair.reports.get(timeout=20))


def answer(pair: Pair, step: int) -> None:
    pair.links.send(
        replace(HEADER, kind=TOKENS, rows=2, width=1, dtype=4, step=step), PARTS, torch.tensor([[3], [step]])
    )


def test_what_has_been_sent_is_let_go_and_the_end_of_a_sequence_with_it(pair: Pair) -> None:
    for step in range(9):
        answer(pair, step)
        pair.links.send(closing(step, slot=0, keeps=True, sender=1), [], torch.empty(0))
        for words in (NUM_WORDS + 2 * PART_WORDS + 2, NUM_WORDS):
            told = torch.zeros(words, dtype=torch.int64)
            pair.ends[1].group.recv([told.view(torch.uint8)], 0, 0).wait()
            assert unpack(told.tolist()[:NUM_WORDS], STAMP).step == step
    assert len(pair.links._under_way) <= 2 * 2  # a step, and the end of a sequence, for each of two stages
    assert pair.links.counts().sent == 18


def test_whoever_sends_tells_of_a_connection_that_broke(pair: Pair) -> None:
    pair.ends[1].shut_down()
    for step in range(100):
        answer(pair, step)
    assert not pair.reports.empty()


def test_whoever_sends_never_waits_for_a_connection_that_breaks_meanwhile() -> None:
    for number in range(100):
        pair = Pair()
        buffers = [torch.zeros(MESSAGE_BYTES, dtype=torch.uint8) for _ in range(MAX_WAITING_MESSAGES)]
        asked_for = [pair.ends[1].group.recv([buffer], 0, 0) for buffer in buffers]  # as a receiver does
        sender = threading.Thread(target=lambda pair=pair: [answer(pair, step) for step in range(30)], daemon=True)
        sender.start()
        time.sleep(number % 20 * 3e-5)
        pair.ends[1].shut_down()
        sender.join(timeout=20)
        assert not sender.is_alive(), number
        pair.links.close()
        del asked_for


def test_closing_wakes_a_receive_that_gloo_cannot_cancel(pair: Pair) -> None:
    assert pair.links._thread.is_alive()
    pair.links.close()
    assert not pair.links._thread.is_alive()
    assert pair.reports.empty()
