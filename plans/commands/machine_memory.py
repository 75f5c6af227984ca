"""How much memory this machine has, and has free, within the limits of the control groups this process lives in."""

import re
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def memory_bytes() -> tuple[int, int]:
    """Return (total, free): the host's, or less where a control group (version 2) of this process has a limit.

    File pages that can be dropped are free, in a group as in the kernel's MemAvailable.
    """
    host = psutil.virtual_memory()
    totals, free = zip((host.total, host.available), *filter(None, map(_group_bytes, _own_groups())), strict=True)
    return min(totals), min(free)


def _own_groups() -> list[Path]:
    """Return the folder of this process's group and of every group above it: each may have a limit."""
    try:
        found = re.search(r"^0::/(.*)$", OWN_CGROUP.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    own = Path(found[1] if found else "")
    return [CGROUPS / group for group in (own, *own.parents)]


def _group_bytes(folder: Path) -> tuple[int, int] | None:
    try:
        limit, used = (int((folder / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return None  # no limit ("max"), another version of control groups, or another system
    return limit, max(0, limit - max(0, used - (int(cached[1]) if cached else 0)))
