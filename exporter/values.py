"""Looks for weights that cannot be right: NaN, infinity, or a tensor of nothing but zeros. On request only."""

from collections.abc import Mapping

from exporter.foreign.origin import Origin
from exporter.sources import Sources
from plans.checkpoint.units import StoredTensor
from plans.dtypes import STORED_DTYPES
from plans.reading.digest import BUFFER_BYTES

_EXPONENTS: Mapping[str, int] = {"F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}
"""Bits of the exponent; NaN and infinity are the values that have all of them set."""


def find_bad_values(origin: Origin) -> dict[str, str]:
    """Return tensor name -> what is wrong with it, in the order of the files.

    Args:
        origin: what is exported; its floating-point weights are read once, in bounded buffers.

    Raises:
        IntegrityError, MachineError: a file changed meanwhile, or cannot be read.
    """
    found = {}
    with Sources.of_origin(origin) as sources:
        for name, stored in origin.checkpoint.tensors.items():
            problem = _check(stored, sources) if stored.entry.dtype in _EXPONENTS else None
            if problem is not None:
                found[name] = problem
    return found


def _check(stored: StoredTensor, sources: Sources) -> str | None:
    import numpy as np

    entry = stored.entry
    mask, width = _EXPONENTS[entry.dtype], STORED_DTYPES[entry.dtype].size_bytes
    num_bad, is_zero = 0, True
    buffer = memoryview(bytearray(min(BUFFER_BYTES, entry.size_bytes)))
    for offset in range(entry.begin, entry.end, BUFFER_BYTES):
        data = buffer[: min(BUFFER_BYTES, entry.end - offset)]
        sources.read(stored.file, buffer=data, offset=offset)
        bits = np.frombuffer(data, dtype=f"<u{width}")
        num_bad += int(np.count_nonzero((bits & mask) == mask))
        is_zero = is_zero and not bits.any()
    if num_bad:
        return f"holds {num_bad} NaN or infinite values of {entry.num_elements}"
    return "holds nothing but zeros" if is_zero and entry.size_bytes else None
