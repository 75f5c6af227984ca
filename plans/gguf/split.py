"""The files of one model: a single one, or `NAME-00001-of-00003.gguf` and those that follow, as their headers say."""

import re
from dataclasses import dataclass
from pathlib import Path

from plans.errors import InputError, IntegrityError, printable
from plans.gguf.header import GgufHeader, read_gguf_header

SPLIT_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufFile:
    """One file with its header."""

    name: str
    header: GgufHeader


def read_gguf_files(path: Path) -> tuple[GgufFile, ...]:
    """Read the header of a file and, where it is the first part of several, of the others.

    Raises:
        InputError: not the first part, a name that contradicts the header, a part that is missing, or malformed.
        IntegrityError: the parts do not hold as many tensors as the first one says, or the same one twice.
    """
    first = GgufFile(path.name, read_gguf_header(path))
    count = _number(first, "split.count", path) or 1
    match = SPLIT_NAME.fullmatch(path.name)
    named = (int(match[2]), int(match[3])) if match else (1, 1)
    said = (_number(first, "split.no", path) + 1, count)
    if named != said:
        raise InputError(
            f"its name says part {named[0]} of {named[1]}, its header part {said[0]} of {said[1]}",
            where=path,
            hint="give it the name it had",
            code="E-SPLIT",
        )
    if match is None:
        return (first,)
    if named[0] != 1:
        raise InputError(
            f"is part {named[0]} of {count}",
            where=path,
            hint=f"give the first: {printable(part_path(path, 1, count))}",
            code="E-SPLIT",
        )
    files = (first, *(_part(path, number, count) for number in range(2, count + 1)))
    _check_tensors(files, path)
    return files


def part_path(path: Path, number: int, count: int) -> Path:
    """Return the path of part `number` (from 1) of a split file."""
    match = SPLIT_NAME.fullmatch(path.name)
    stem = match[1] if match else path.stem
    return path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf")


def _part(first: Path, number: int, count: int) -> GgufFile:
    path = part_path(first, number, count)
    if not path.exists():
        raise InputError(
            f"part {number} of {count} is missing: {printable(path.name)}",
            where=first,
            hint="fetch it into the same folder",
            code="E-SPLIT",
        )
    part = GgufFile(path.name, read_gguf_header(path))
    said = (_number(part, "split.no", path) + 1, _number(part, "split.count", path))
    if said != (number, count):
        raise InputError(
            f"its name says part {number} of {count}, its header part {said[0]} of {said[1]}",
            where=path,
            hint="it belongs to another model; fetch it again",
            code="E-SPLIT",
        )
    return part


def _check_tensors(files: tuple[GgufFile, ...], path: Path) -> None:
    owners: dict[str, str] = {}
    for file in files:
        for name in file.header.tensors:
            if name in owners:
                raise IntegrityError(
                    f"{printable(name)} is in {owners[name]} and in {file.name}", where=path, code="E-DUPLICATE"
                )
            owners[name] = file.name
    said = _number(files[0], "split.tensors.count", path)
    if said != len(owners):
        raise IntegrityError(
            f"the {len(files)} parts hold {len(owners)} tensors, split.tensors.count says {said}",
            where=path,
            hint="a part belongs to another model; fetch them again",
            code="E-SPLIT",
        )


def _number(file: GgufFile, key: str, path: Path) -> int:
    """Return a whole number of the metadata, 0 where it is absent."""
    found = file.header.metadata.get(key, 0)
    if type(found) is not int or not 0 <= found < 1 << 20:
        raise InputError(f"{key} is {printable(found, limit=40)}", where=path, expected="a number", code="E-SPLIT")
    return found
