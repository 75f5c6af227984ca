"""Which link is silent, decided from what both its ends say."""

import pytest

from runtime.distributed.control.messages import LinkCounts
from runtime.distributed.control.silence import LinkWatch, Patience

BEAT, LIMIT, JOIN = 1.0, 10.0, 20.0


def counts(*, sent: int = 0, received: int = 0, size: int = 0, is_waiting: bool = True, epoch: int = 1) -> LinkCounts:
    return LinkCounts(epoch=epoch, sent=sent, received=received, received_bytes=size, is_waiting=is_waiting)


@pytest.fixture
def watch() -> LinkWatch:
    """Three stages, connected."""
    made = LinkWatch(3, patience=Patience(join_seconds=JOIN, heartbeat_seconds=LIMIT), who=lambda rank: f"stage {rank}")
    made.start(1, now=0.0)
    made.connected()
    return made


def listen(watch: LinkWatch, *said: LinkCounts | None, start: int = 0, seconds: int = 60) -> tuple[float, str] | None:
    """Hear the same from every rank once per heartbeat; return when a link was found silent, and what is said."""
    for now in range(start, start + seconds):
        for rank, one in enumerate(said):
            if one is not None:
                watch.hear(rank, one, now=float(now))
        if (error := watch.fault(now=float(now))) is not None:
            return now, error.line()
    return None


@pytest.mark.row("P17")
def test_a_message_that_was_begun_and_does_not_arrive_names_both_ends(watch: LinkWatch) -> None:
    found = listen(watch, counts(sent=5), counts(sent=4, received=5), counts(received=3))
    assert found is not None
    when, line = found
    assert LIMIT - BEAT <= when <= LIMIT + BEAT
    assert "data from stage 1 does not reach stage 2: 4 messages were sent, 3 arrived" in line


def test_an_idle_chain_is_not_silent(watch: LinkWatch) -> None:
    said = counts(sent=5, received=5)
    assert listen(watch, said, said, said) is None


def test_a_stage_that_computes_keeps_its_senders_waiting(watch: LinkWatch) -> None:
    assert listen(watch, counts(sent=9), counts(received=3, is_waiting=False), counts()) is None


def test_bytes_that_arrive_are_progress(watch: LinkWatch) -> None:
    for now in range(0, 200, 8):
        said = counts(received=3, size=now)
        assert listen(watch, counts(sent=4), said, counts(), start=now, seconds=8) is None


def test_an_end_that_is_not_heard_of_is_no_matter_of_the_link(watch: LinkWatch) -> None:
    """The other watch, for heartbeats, tells of it."""
    listen(watch, counts(sent=4), counts(received=3), counts(), seconds=1)
    assert listen(watch, counts(sent=4), None, counts(), start=1) is None


def test_after_a_pause_of_the_watch_silence_counts_anew(watch: LinkWatch) -> None:
    said = (counts(sent=4), counts(received=3), counts())
    assert listen(watch, *said, seconds=8) is None
    watch.forgive()
    assert listen(watch, *said, start=100, seconds=8) is None
    found = listen(watch, *said, start=108)
    assert found is not None
    assert found[0] <= 100 + LIMIT + BEAT


def test_what_is_said_about_an_earlier_epoch_does_not_count(watch: LinkWatch) -> None:
    watch.start(2, now=0.0)
    watch.connected()
    assert listen(watch, counts(sent=4), counts(received=3), counts()) is None


@pytest.mark.row("P17")
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_the_first_link_that_does_not_connect_is_named(watch: LinkWatch, missing: int) -> None:
    watch.start(2, now=100.0)
    for link in range(missing):
        watch.linked(link, link, epoch=2)
        watch.linked((link + 1) % 3, link, epoch=2)
    watch.linked(missing, missing, epoch=2)
    assert watch.fault(now=100 + JOIN) is None
    error = watch.fault(now=100 + JOIN + 1)
    assert error is not None
    assert f"between stage {missing} and stage {(missing + 1) % 3} within 20 s" in error.line()
