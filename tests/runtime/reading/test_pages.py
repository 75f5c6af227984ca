"""What the system is told about memory: huge pages for mapped weights, and memory that goes back."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from plans.checkpoint.folder import open_checkpoint
from runtime.reading.pages import files_get_huge_pages, give_back
from runtime.reading.tensors import FolderTensors

HAS_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="this system has no huge pages to ask for")
def test_mapped_weights_ask_for_huge_pages_before_they_are_read(shipped: Path) -> None:
    tensors = FolderTensors(open_checkpoint(shipped))
    weight = tensors[next(iter(tensors))]
    areas = areas_of(Path("/proc/self/smaps").read_text())
    (of_weight,) = [lines for head, *lines in areas if contains(head, weight.data_ptr())]
    assert " hg" in next(line for line in of_weight if line.startswith("VmFlags"))


@pytest.mark.parametrize("page", ["FilePmdMapped:   2048 kB", "FilePmdMapped:      0 kB", "Rss:   2048 kB"])
def test_a_folder_is_tried_with_a_file_that_does_not_stay(
    tmp_path: Path, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter(["FilePmdMapped: 0 kB", page])
    monkeypatch.setattr(Path, "read_text", lambda *_args, **_options: next(told))
    assert files_get_huge_pages(tmp_path) == (hasattr(mmap, "MADV_HUGEPAGE") and "2048 kB" in page and "File" in page)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_tried_promises_nothing(tmp_path: Path) -> None:
    assert not files_get_huge_pages(tmp_path / "missing")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory may go back later")
def test_only_whole_pages_go_back() -> None:
    page = mmap.PAGESIZE
    memory = torch.ones(4 * page, dtype=torch.uint8)
    first = -memory.data_ptr() % page
    give_back(memory.data_ptr() + first + 1, 2 * page)
    assert memory.sum() == 3 * page
    assert not memory[first + page : first + 2 * page].any()


def areas_of(smaps: str) -> list[list[str]]:
    """Return the lines of each area of memory, its addresses and file first."""
    areas: list[list[str]] = []
    for line in smaps.splitlines():
        if line.split(" ")[0].count("-") == 1 and ":" not in line.split(" ")[0]:
            areas.append([line.rstrip()])
        else:
            areas[-1].append(line)
    return areas


def contains(head: str, address: int) -> bool:
    begin, end = (int(part, 16) for part in head.split(" ")[0].split("-"))
    return begin <= address < end
