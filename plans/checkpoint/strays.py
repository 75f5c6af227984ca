"""Files in a model's folder that look like a part of it, and are not read."""

from collections.abc import Collection
from pathlib import Path

from plans.checkpoint.foreign import ADAPTERS, PART
from plans.checkpoint.header import read_header
from plans.checkpoint.names import canonical_names, unit_of
from plans.errors import LlamaplanError, printable

MOST_NAMED = 3
VENDOR_PREFIX = "consolidated"


def stray_warnings(folder: Path, names: Collection[str]) -> tuple[str, ...]:
    """Return a warning that names the files whose tensors would be the model's, if anything listed them.

    Numbered parts are named without being opened, and so is a file that cannot be read. A vendor's own format beside
    the model's (`consolidated.safetensors`) is the same model in other words.

    Args:
        folder: the checkpoint.
        names: what lies in it, but for the files that were read.
    """
    files = {name for name in names if name.endswith(".safetensors") and not name.startswith(VENDOR_PREFIX)}
    strays = sorted(name for name in files - set(ADAPTERS) if _seems_a_part(folder, name))
    if not strays:
        return ()
    shown = ", ".join(map(printable, strays[:MOST_NAMED])) + (", ..." if len(strays) > MOST_NAMED else "")
    return (f"files that seem to be parts of the model are not read, as no index lists them: {shown}",)


def _seems_a_part(folder: Path, name: str) -> bool:
    if PART.fullmatch(name):
        return True
    try:
        found = canonical_names(read_header(folder / name).tensors, where=folder)
    except LlamaplanError:
        return True
    return any(unit_of(tensor) for tensor in found.values())
