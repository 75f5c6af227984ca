"""Are two stored tensors the same? Read and compared, and left at the first difference."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plans.checkpoint.names import EMBEDDING, HEAD
from plans.checkpoint.run_dtype import run_dtype
from plans.checkpoint.units import Checkpoint, StoredTensor
from plans.dtypes import DTYPES, STORED_DTYPES, DtypeName
from plans.reading.digest import read_into
from plans.reading.files import open_regular

CHUNK_ELEMENTS = 1 << 20


def has_own_head(checkpoint: Checkpoint, folder: Path) -> bool:
    """Return whether a head is stored that is not a copy of the embedding.

    transformers ties what is equal once it is loaded, and leaves a head of other values its own, whatever
    `tie_word_embeddings` says (`PreTrainedModel.tie_weights`). Scales and packed weights are part of what is compared.

    Raises:
        InputError, MachineError: a file cannot be read.
    """
    head, table = _parts(checkpoint.tensors, HEAD), _parts(checkpoint.tensors, EMBEDDING)
    if not head:
        return False
    if head.keys() != table.keys():
        return True
    is_one_dtype = all(head[part].entry.dtype == table[part].entry.dtype for part in head)
    dtype = None if is_one_dtype else run_dtype(checkpoint)
    return not all(is_same_tensor(folder, head[part], table[part], dtype=dtype) for part in head)


def _parts(tensors: Mapping[str, StoredTensor], weight: str) -> dict[str, StoredTensor]:
    prefix = weight.removesuffix("weight")
    parts = {name.removeprefix(prefix): stored for name, stored in tensors.items() if name.startswith(prefix)}
    parts.pop("bias", None)  # a head's own, tied or not
    return parts


def is_same_tensor(folder: Path, first: StoredTensor, second: StoredTensor, *, dtype: DtypeName | None = None) -> bool:
    """Return whether two tensors of a folder hold the same values.

    Args:
        folder: where their files lie.
        first: one of them.
        second: the other one.
        dtype: the dtype in which they have to be equal where they are stored in two; None: then they differ.

    Raises:
        InputError, MachineError: a file cannot be read.
    """
    ours, theirs = first.entry, second.entry
    if ours.shape != theirs.shape:
        return False
    is_one_dtype = ours.dtype == theirs.dtype
    if not is_one_dtype and (dtype is None or None in {STORED_DTYPES[e.dtype].name for e in (ours, theirs)}):
        return False
    with open_regular(folder / first.file) as one, open_regular(folder / second.file) as other:
        for start in range(0, ours.num_elements, CHUNK_ELEMENTS):
            left, right = _read(one, first, start), _read(other, second, start)
            if is_one_dtype or dtype is None:
                is_same = left == right
            else:
                is_same = _is_equal_in(dtype, (left, ours.dtype), (right, theirs.dtype))
            if not is_same:
                return False
    return True


def _read(fd: int, stored: StoredTensor, start: int) -> bytes:
    width = STORED_DTYPES[stored.entry.dtype].size_bytes
    count = min(CHUNK_ELEMENTS, stored.entry.num_elements - start)
    buffer = memoryview(bytearray(count * width))
    read_into(fd, buffer, offset=stored.entry.begin + start * width, where=stored.file)
    return bytes(buffer)


def _is_equal_in(dtype: DtypeName, *sides: tuple[bytes, str]) -> bool:
    """Compare as loading does: every value converted to `dtype` first."""
    import numpy as np

    first, second = (_rounded(_as_float32(data, stored), dtype) for data, stored in sides)
    return bool(np.array_equal(first, second))


def _as_float32(data: bytes, stored: str) -> Any:
    import numpy as np

    if stored == DTYPES["bf16"].stored:
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")  # bf16 is the upper half of fp32
    return np.frombuffer(data, {2: "<f2", 4: "<f4"}[STORED_DTYPES[stored].size_bytes]).astype("<f4")


def _rounded(values: Any, dtype: DtypeName) -> Any:
    import numpy as np

    if dtype == "fp16":
        with np.errstate(over="ignore"):
            return values.astype("<f2")
    if dtype == "bf16":  # to nearest, ties to even, as torch rounds
        bits = values.view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).view("<f4")
    return values
