"""Which files of a folder hold its weights: one file, the files of an index, or shards that lack one.

Where two answers are possible their tensors are compared; files that hold different models are refused, never chosen.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plans.checkpoint.header import SafetensorsHeader, read_header
from plans.checkpoint.same import is_same_tensor
from plans.checkpoint.strays import stray_warnings
from plans.checkpoint.units import INDEX_NAME, SINGLE_NAME, Shard, StoredTensor
from plans.errors import InputError, printable
from plans.reading.files import check_basename, read_limited
from plans.reading.strict import parse_json

MAX_INDEX_BYTES = 32 << 20
MAX_TENSORS = 500_000
_NUMBERED = re.compile(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class Weights:
    """The files that are used, by name; none where a folder holds only a configuration."""

    shards: tuple[Shard, ...] = ()
    warnings: tuple[str, ...] = ()
    index_dtype: str | None = None
    missing: str = ""
    """A file the index lists and that is not there; another file is used."""


@dataclass(frozen=True, slots=True)
class _Index:
    path: Path
    weight_map: Mapping[str, str]
    metadata: Mapping[str, Any]

    @property
    def files(self) -> list[str]:
        return sorted(set(self.weight_map.values()))


def open_weights(folder: Path, names: Collection[str], *, is_downloading: bool) -> Weights:
    """Read the headers of a folder's weights.

    Args:
        folder: the checkpoint.
        names: what lies in it.
        is_downloading: whether its cache has a file under way, so that missing ones are explained.

    Raises:
        InputError: files contradict each other, or some are missing; the message names them.
        IntegrityError: a shard is truncated or its layout is broken.
    """
    index = _read_index(folder) if INDEX_NAME in names else None
    found = _choose(folder, names, index, is_downloading=is_downloading)
    if not found.shards:
        return found
    judged = {SINGLE_NAME, *(index.files if index else ()), *(shard.name for shard in found.shards)}
    return replace(found, warnings=found.warnings + stray_warnings(folder, set(names) - judged))


def incomplete(folder: Path, what: str) -> InputError:
    """Return the error of a download that never finished."""
    return InputError(f"{what}: the download is incomplete", where=folder, hint="finish it first", code="E-INCOMPLETE")


def _choose(folder: Path, names: Collection[str], index: _Index | None, *, is_downloading: bool) -> Weights:
    if index is None and SINGLE_NAME in names:
        return Weights((Shard(SINGLE_NAME, read_header(folder / SINGLE_NAME)),))
    if index is None:
        return _open_numbered(folder, names)
    if SINGLE_NAME in names and SINGLE_NAME not in index.files:
        return _index_or_single(folder, index)
    return _open_indexed(folder, index, is_downloading=is_downloading)


def _read_index(folder: Path) -> _Index:
    path = folder / INDEX_NAME
    document = parse_json(read_limited(path, max_bytes=MAX_INDEX_BYTES), where=path)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError("weight_map is not a table of file names", where=path, code="E-INDEX")
    if not 1 <= len(weight_map) <= MAX_TENSORS:
        raise InputError(
            f"weight_map lists {len(weight_map)} tensors",
            where=path,
            expected=f"1 to {MAX_TENSORS}",
            code="E-INDEX",
        )
    for name in set(weight_map.values()):
        check_basename(name, where=path)
    metadata = document.get("metadata")
    return _Index(path, weight_map, metadata if isinstance(metadata, dict) else {})


def _open_indexed(folder: Path, index: _Index, *, is_downloading: bool) -> Weights:
    missing = next((name for name in index.files if not (folder / name).exists()), None)
    if missing is not None:
        if is_downloading:
            raise incomplete(folder, f"{missing} is missing")
        raise InputError(f"lists {missing}, which is missing", where=index.path, hint="fetch it again", code="E-INDEX")
    shards = tuple(Shard(name, read_header(folder / name)) for name in index.files)
    _compare_index(index, shards)
    dtype = index.metadata.get("dtype")
    return Weights(shards, _total_size_warning(index, shards), dtype if isinstance(dtype, str) else None)


def _compare_index(index: _Index, shards: tuple[Shard, ...]) -> None:
    for shard in shards:
        listed = {name for name, file in index.weight_map.items() if file == shard.name}
        missing = sorted(listed - set(shard.header.tensors))
        if missing:
            raise InputError(
                f"says {printable(missing[0])} is in {shard.name}, which does not hold it",
                where=index.path,
                code="E-INDEX",
            )
        extra = sorted(set(shard.header.tensors) - listed)
        if extra:
            raise InputError(
                f"{shard.name} holds {printable(extra[0])}, which the index "
                + ("maps to another file" if extra[0] in index.weight_map else "does not list"),
                where=index.path,
                code="E-INDEX",
            )


def _total_size_warning(index: _Index, shards: tuple[Shard, ...]) -> tuple[str, ...]:
    if "total_size" not in index.metadata:
        return ()
    stated = index.metadata["total_size"]
    actual = sum(e.size_bytes for shard in shards for e in shard.header.tensors.values())
    if type(stated) in (int, float) and stated == actual:
        return ()
    return (f"{INDEX_NAME} states total_size {printable(stated, limit=30)}, the headers hold {actual} bytes",)


def _index_or_single(folder: Path, index: _Index) -> Weights:
    """The index where it and the single file hold the same; the single file where those of the index are missing."""
    single = Shard(SINGLE_NAME, read_header(folder / SINGLE_NAME))
    missing = [name for name in index.files if not (folder / name).exists()]
    present = tuple(Shard(name, read_header(folder / name)) for name in index.files if name not in missing)
    _refuse_two_models(folder, single, present, is_whole=not missing)
    if not missing:
        found = _open_indexed(folder, index, is_downloading=False)
        both = f"both {INDEX_NAME} and {SINGLE_NAME} are present and hold the same tensors; the index is used"
        return Weights(found.shards, (*found.warnings, both), found.index_dtype)
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    said = f"{INDEX_NAME} lists {missing[0]}{more}, which is missing; {SINGLE_NAME} is complete and is used"
    return Weights((single,), (said,), missing=missing[0])


def _refuse_two_models(folder: Path, single: Shard, shards: tuple[Shard, ...], *, is_whole: bool) -> None:
    """Compare every tensor of the index's files with the single file's, to the first difference."""
    ours = _tensors(single.header, SINGLE_NAME)
    theirs = {name: t for shard in shards for name, t in _tensors(shard.header, shard.name).items()}
    unmatched = sorted(theirs.keys() - ours.keys() if not is_whole else theirs.keys() ^ ours.keys())
    different = unmatched or sorted(
        name
        for name in theirs
        if (ours[name].entry.dtype, ours[name].entry.shape) != (theirs[name].entry.dtype, theirs[name].entry.shape)
    )
    name = different[0] if different else None
    if name is None:
        name = next((n for n, stored in theirs.items() if not is_same_tensor(folder, ours[n], stored)), None)
    if name is not None:
        how = "only one of them holds" if unmatched else "they differ in"
        raise InputError(
            f"{INDEX_NAME} and {SINGLE_NAME} belong to two models: {how} {printable(name)}",
            where=folder,
            expected="one model in a folder",
            hint=f"move the other away: transformers loads {SINGLE_NAME}, other engines the files of the index",
            code="E-TWO-MODELS",
        )


def _tensors(header: SafetensorsHeader, file: str) -> dict[str, StoredTensor]:
    return {name: StoredTensor(file, entry, name) for name, entry in header.tensors.items()}


def _numbered(names: Collection[str]) -> list[tuple[int, int, str]]:
    found = ((match, name) for name in sorted(names) if (match := _NUMBERED.fullmatch(name)))
    return [(int(match[1]), int(match[2]), name) for match, name in found]


def _open_numbered(folder: Path, names: Collection[str]) -> Weights:
    """Shards without an index: their headers say what an index would, if they are all there."""
    shards = _numbered(names)
    if not shards:
        return Weights()
    totals = sorted({total for _number, total, _name in shards})
    if len(totals) > 1:
        raise InputError(
            f"holds shards of {totals[0]} and of {totals[1]} files, and no {INDEX_NAME}",
            where=folder,
            hint="fetch the index, or move the files of the other model away",
            code="E-TWO-MODELS",
        )
    absent = sorted(set(range(1, totals[0] + 1)) - {number for number, _total, _name in shards})
    if absent or len(shards) != totals[0]:
        first = f"number {absent[0]} is missing" if absent else f"{shards[-1][2]} is too many"
        raise InputError(
            f"holds {len(shards)} of {totals[0]} shards and no {INDEX_NAME}: {first}",
            where=folder,
            hint="fetch it again",
            code="E-INDEX",
        )
    said = f"no {INDEX_NAME}: the headers of all {len(shards)} shards are read instead; transformers needs the index"
    return Weights(tuple(Shard(name, read_header(folder / name)) for _n, _t, name in shards), (said,))
