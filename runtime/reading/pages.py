"""What the system is told about memory of this process; where it knows no such advice, nothing happens."""

import ctypes
import mmap
import tempfile
from pathlib import Path

HUGE_BYTES = 2 << 20


def files_get_huge_pages(folder: Path) -> bool:
    """Try whether a new file in a folder is mapped in huge pages here; False where nobody tells."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        before = _file_bytes_in_huge_pages()
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(2 * HUGE_BYTES))
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                mapped.madvise(mmap.MADV_HUGEPAGE)
                mapped[:: mmap.PAGESIZE]  # touches them
                return _file_bytes_in_huge_pages() > before
    except (OSError, StopIteration):
        return False


def _file_bytes_in_huge_pages() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("FilePmdMapped:"))


def prefer_huge_pages(address: int, size: int) -> None:
    """Have pages of 2 MiB behind this memory, as far as its pages have not been touched yet.

    A step reads every weight once. In pages of 4 KiB a good part of that time goes into looking up addresses, in a
    virtual machine above all. Mapped files get huge pages where their file system caches in such sizes (ext4 from Linux
    6.16, for one) and they are not cached in smaller ones already. A mapping is best given whole: each border within it
    is a border between pages.
    """
    _advise(getattr(mmap, "MADV_HUGEPAGE", None), address, size)


def give_back(address: int, size: int) -> None:
    """Let the machine have the whole pages of this memory, whose values are lost."""
    _advise(getattr(mmap, "MADV_DONTNEED", None), address, size)


def _advise(advice: int | None, address: int, size: int) -> None:
    first, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if advice is not None and end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), advice)
