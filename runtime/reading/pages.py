"""What the system is told about memory of this process; where it knows no such advice, nothing happens."""

import ctypes
import mmap


def prefer_huge_pages(address: int, size: int) -> None:
    """Have pages of 2 MiB behind this memory, as far as its pages have not been touched yet.

    A step reads every weight once. In pages of 4 KiB a good part of that time goes into looking up addresses, in a
    virtual machine above all. Mapped files get huge pages where their file system caches in such sizes (ext4 from Linux
    6.16, XFS, btrfs) and they are not cached in smaller ones already. A mapping is best given whole: each border within
    it is a border between pages.
    """
    _advise(getattr(mmap, "MADV_HUGEPAGE", None), address, size)


def give_back(address: int, size: int) -> None:
    """Let the machine have the whole pages of this memory, whose values are lost."""
    _advise(getattr(mmap, "MADV_DONTNEED", None), address, size)


def _advise(advice: int | None, address: int, size: int) -> None:
    first, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if advice is not None and end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), advice)
