"""What several processes read together: a number where all answer, nothing where one does not."""

import pytest

from planner.measure.processor import bus


def test_processes_that_read_at_once_add_up_to_a_rate_of_this_world() -> None:
    found = bus.read_together(2, num_bytes=4 << 20, threads=1)
    assert found is not None
    assert 1e6 < found < 1e14


def test_processes_that_do_not_answer_in_time_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "TIMEOUT_SECONDS", 0.0)
    assert bus.read_together(2, num_bytes=4 << 20, threads=1) is None
