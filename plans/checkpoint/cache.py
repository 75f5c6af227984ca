"""The Hugging Face cache: which snapshot of a repository's folder is meant."""

import re
from pathlib import Path

from plans.errors import InputError, printable

REPOSITORY_PREFIX = "models--"
_REVISION = re.compile(r"[0-9a-zA-Z._-]{1,64}")
MAX_SHOWN = 3


def find_snapshot(path: Path) -> Path:
    """Return the snapshot to use where `path` is a repository's folder in the cache (or its `snapshots`), else `path`.

    That is the one `refs/main` names, or the only one there is.

    Raises:
        InputError: several and none marked main, none at all, or the whole cache was given; the message says which.
    """
    repository = path.parent if path.name == "snapshots" else path
    if not _is_dir(path) or _holds_config(path):
        return path
    if _is_dir(repository / "snapshots") or repository.name.startswith(REPOSITORY_PREFIX):
        return _snapshot(repository)
    _refuse_whole_cache(path)
    return path


def repository_name(folder: str) -> str:
    """Return ``org/name`` of a repository's folder name."""
    return folder.removeprefix(REPOSITORY_PREFIX).replace("--", "/")


def _holds_config(path: Path) -> bool:
    try:
        return (path / "config.json").exists()
    except OSError:
        return True  # let opening it say what is wrong


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False  # let opening it say what is wrong


def _snapshot(repository: Path) -> Path:
    snapshots = repository / "snapshots"
    try:
        present = sorted(entry.name for entry in snapshots.iterdir())
        main = repository / "refs" / "main"
        revision = main.read_text(encoding="ascii", errors="replace")[:100].strip() if main.is_file() else ""
    except OSError:
        present, revision = [], ""
    if _REVISION.fullmatch(revision) and revision in present:
        return snapshots / revision
    if len(present) == 1:
        return snapshots / present[0]
    if present:
        raise InputError(
            f"{len(present)} snapshots are in the cache and none is marked main: {_some(present)}",
            where=repository,
            hint=f"give one's folder: {printable(snapshots / present[0], limit=300)}",
            code="E-MISSING",
        )
    raise InputError(
        "the download is incomplete: the cache holds no snapshot of it",
        where=repository,
        hint=f"finish it: hf download {printable(repository_name(repository.name))}",
        code="E-INCOMPLETE",
    )


def _refuse_whole_cache(path: Path) -> None:
    try:
        found = sorted(entry.name for entry in path.iterdir() if entry.name.startswith(REPOSITORY_PREFIX))
    except OSError:
        return
    if found:
        raise InputError(
            f"is a cache of {len(found)} models: {_some([repository_name(name) for name in found])}",
            where=path,
            hint=f"give one of them: {printable(path / found[0], limit=300)}",
            code="E-MISSING",
        )


def _some(names: list[str]) -> str:
    return ", ".join(map(printable, names[:MAX_SHOWN])) + (", ..." if len(names) > MAX_SHOWN else "")
