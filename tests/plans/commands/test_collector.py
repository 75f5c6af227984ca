"""Nobody looks for garbage while large libraries are imported, and somebody does afterwards."""

import gc
import sys
import weakref
from collections.abc import Iterator

import pytest

from plans.commands.collector import resting_collector


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def torch_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "torch", None)
    yield
    gc.unfreeze()


def ring() -> weakref.ref[Ring]:
    return weakref.ref(Ring())


def test_the_collector_rests_while_libraries_are_imported_and_finds_garbage_afterwards() -> None:
    with resting_collector():
        assert not gc.isenabled()
        kept = gc.get_freeze_count()
    assert gc.isenabled()
    assert gc.get_freeze_count() > kept
    made = ring()
    gc.collect()
    assert made() is None


def test_the_collector_works_again_after_an_import_that_fails() -> None:
    with pytest.raises(ImportError), resting_collector():
        raise ImportError("no such library")
    assert gc.isenabled()


def test_the_collector_goes_on_where_the_libraries_are_imported_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    kept = gc.get_freeze_count()
    with resting_collector():
        assert gc.isenabled()
    assert gc.get_freeze_count() == kept
