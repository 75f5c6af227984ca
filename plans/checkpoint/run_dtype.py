"""In which dtype does a checkpoint run? As transformers' `from_pretrained` decides when nobody tells it."""

from plans.checkpoint.units import Checkpoint, StoredTensor
from plans.dtypes import DTYPE_NAMES, STORED_DTYPES, DtypeName
from plans.errors import InputError, printable


def run_dtype(checkpoint: Checkpoint) -> DtypeName:
    """Return the dtype of `config.json`; else the index's; else that of the first floating-point weight.

    The first is meant as transformers means it: of the first file, the names in alphabetical order, FP8 left out
    (`transformers.modeling_utils._get_dtype` and `get_state_dict_dtype`).

    Raises:
        InputError: weights of a dtype the runtime does not compute in, and nothing that says another.

    Example:
        >>> run_dtype(open_checkpoint(Path("my-model")))  # doctest: +SKIP
        'bf16'
    """
    if checkpoint.config.states_dtype or not checkpoint.shards:
        return checkpoint.config.dtype
    if checkpoint.index_dtype is not None:
        return _known(checkpoint.index_dtype, checkpoint, "the index says")
    first = _first_float(checkpoint)
    if first is None:
        return checkpoint.config.dtype
    return _known(STORED_DTYPES[first.entry.dtype].torch, checkpoint, f"{printable(first.name)}, the first weight, is")


def _first_float(checkpoint: Checkpoint) -> StoredTensor | None:
    file = min(shard.name for shard in checkpoint.shards)
    here = sorted((t for t in checkpoint.tensors.values() if t.file == file), key=lambda t: t.name)
    return next((t for t in here if _can_compute(t.entry.dtype)), None)


def _can_compute(stored: str) -> bool:
    return STORED_DTYPES[stored].is_float and "float8" not in STORED_DTYPES[stored].torch


def _known(text: str, checkpoint: Checkpoint, what: str) -> DtypeName:
    if text not in DTYPE_NAMES:
        raise InputError(
            f"{what} {printable(text, limit=40)}, and config.json states no dtype",
            where=checkpoint.path,
            expected="float32, float16 or bfloat16",
            hint="choose one with --dtype",
            code="E-DTYPE",
        )
    return DTYPE_NAMES[text]
