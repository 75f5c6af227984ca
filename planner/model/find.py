"""What a person typed as MODEL -> a path: a folder, a configuration or GGUF file, or a name in the cache."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from plans.checkpoint.cache import REPOSITORY_PREFIX, find_snapshot, repository_name
from plans.errors import InputError, printable
from plans.gguf.split import SPLIT_NAME
from plans.reading.files import typed_path

_ADDRESS = re.compile(
    r"(?i:https?|file|hf|s3|gs)://(?:(?i:(?:www\.)?huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+))?.*", re.DOTALL
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def find_model(text: str, *, environment: Mapping[str, str] = os.environ) -> Path:
    """Resolve a model argument without touching the network.

    Args:
        text: folder, path of a `config.json` or a GGUF file, or ``org/name`` if that lies in the Hugging Face cache.
        environment: where HF_HUB_CACHE, HF_HOME and XDG_CACHE_HOME are looked up.

    Raises:
        InputError: neither a path nor a cached model, or a cached model whose download never finished.
    """
    path = typed_path(text)
    if _exists(path):
        return find_snapshot(path)
    _refuse_address(text)
    if not _HUB_NAME.fullmatch(text) or path.suffix == ".gguf":
        return path
    repository = cache_folder(environment) / (REPOSITORY_PREFIX + text.replace("/", "--"))
    if not repository.is_dir():
        raise InputError(
            f"no such file or folder, and {printable(text)} is not in the Hugging Face cache {repository.parent}",
            where=text,
            hint=f"download it first: hf download {printable(text)}",
            code="E-MISSING",
        )
    return find_snapshot(repository)


def _refuse_address(text: str) -> None:
    """Nothing is fetched: an address is refused, of a page of the Hugging Face hub with what fetches it."""
    address = _ADDRESS.fullmatch(text)
    if address is not None:
        name = printable(address[1]) if address[1] else ""
        raise InputError(
            "is an address, and nothing is fetched from the network",
            where=printable(text, limit=200),
            expected="a folder, a file, or org/name of a model in the Hugging Face cache",
            hint=f"download it first: hf download {name}, then give {name}" if name else "",
            code="E-MISSING",
        )


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Return the Hugging Face hub cache, by the variables and defaults of `huggingface_hub`."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(variable):
            return typed_path(environment[variable])
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    home = environment.get("HF_HOME") or f"{cache}/huggingface"
    return typed_path(home) / "hub"


def model_name(path: Path) -> str:
    """Return a short name for a model's path: ``org/name`` in a cache, else the name of its folder or file."""
    absolute = path.absolute()
    if absolute.suffix == ".gguf":
        part = SPLIT_NAME.fullmatch(absolute.name)
        return printable(part[1] if part else absolute.stem)
    folder = absolute.parent if absolute.suffix == ".json" else absolute
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith(REPOSITORY_PREFIX):
        return printable(repository_name(repository))
    is_other_file = absolute.suffix == ".json" and absolute.stem != "config"
    # resolve() only to give "." and "x/.." a name
    return printable(absolute.stem if is_other_file else folder.resolve().name or "model")


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):
        return True  # let opening it say what is wrong
