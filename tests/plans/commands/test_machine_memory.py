"""What is free, in a made-up tree of control groups on a made-up host: planner and runtime say the same."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from planner.devices.machine import inspect_machine
from plans.commands import machine_memory
from runtime.reading.capacity import free_bytes

GIB = 1 << 30


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A host of 64 GiB with 48 free, whose control groups are in `tmp_path`; this process is in /pod/job."""
    memory = SimpleNamespace(total=64 * GIB, available=48 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(machine_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine_memory, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/pod/job\n", encoding="utf-8")
    return memory


def limit(folder: Path, *, most: int | str, used: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n", encoding="ascii")
    (folder / "memory.current").write_text(f"{used}\n", encoding="ascii")
    stat = f"file {inactive + GIB}\ninactive_anon 5\ninactive_file {inactive}\nactive_file {GIB}\n"
    (folder / "memory.stat").write_text(stat, encoding="ascii")


def assert_free(expected: int) -> None:
    """The one number of the planner and of the runtime."""
    assert inspect_machine().free_bytes["cpu"] == expected
    assert free_bytes(torch.device("cpu")) == expected


@pytest.mark.parametrize("group", ["", "pod", "pod/job"])
def test_page_cache_that_can_be_dropped_is_free_whichever_group_has_the_limit(tmp_path: Path, group: str) -> None:
    limit(tmp_path / group, most=8 * GIB, used=7 * GIB, inactive=6 * GIB)
    assert_free(7 * GIB)
    assert inspect_machine().cluster.device("cpu").memory_bytes == 8 * GIB


def test_a_container_has_no_more_than_its_host(tmp_path: Path, host: SimpleNamespace) -> None:
    limit(tmp_path, most=8 * GIB, used=7 * GIB, inactive=6 * GIB)
    host.available = 3 * GIB
    assert_free(3 * GIB)
    limit(tmp_path, most=128 * GIB, used=GIB)
    assert machine_memory.memory_bytes() == (64 * GIB, 3 * GIB)


def test_of_nested_groups_the_one_with_the_least_left_counts(tmp_path: Path) -> None:
    limit(tmp_path / "pod/job", most=8 * GIB, used=2 * GIB)
    limit(tmp_path / "pod", most=16 * GIB, used=12 * GIB, inactive=GIB)
    limit(tmp_path / "elsewhere", most=GIB, used=GIB)
    assert machine_memory.memory_bytes() == (8 * GIB, 5 * GIB)


def test_a_group_above_its_limit_has_nothing_left(tmp_path: Path) -> None:
    limit(tmp_path / "pod", most=GIB, used=2 * GIB)
    assert_free(0)


def test_without_a_limit_the_host_counts(tmp_path: Path) -> None:
    assert_free(48 * GIB)
    limit(tmp_path / "pod/job", most="max", used=GIB)
    assert_free(48 * GIB)
    (tmp_path / "own").unlink()
    assert machine_memory.memory_bytes() == (64 * GIB, 48 * GIB)


def test_the_limit_at_the_root_counts_where_the_own_group_cannot_be_seen(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/../sibling\n", encoding="utf-8")
    limit(tmp_path, most=2 * GIB, used=GIB)
    assert machine_memory.memory_bytes() == (2 * GIB, GIB)
