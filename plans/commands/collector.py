"""Python's collector of cyclic garbage, which has nothing to find among what large libraries make."""

import contextlib
import gc
import sys
from collections.abc import Iterator

FEWER_COLLECTIONS = (20_000, 50, 50)
"""How rarely a command looks for garbage: not every 700 objects, as Python does."""


@contextlib.contextmanager
def resting_collector() -> Iterator[None]:
    """Import large libraries within the block: nobody looks for garbage in it, nor ever among what it made.

    Importing torch and transformers makes half a million objects, and all of them stay. Where torch is imported
    already, little is left to import, and the collector goes on.
    """
    if sys.modules.get("torch") is not None:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
