"""The largest resident memory this process has had."""

import re
import resource
import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Return the largest resident memory this process has had."""
    try:
        # Not getrusage: there Linux lets a new process inherit the peak of the one that started it.
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
