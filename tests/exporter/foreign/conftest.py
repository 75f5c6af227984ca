"""The shipped checkpoint as GGUF files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gguf_models import all_of, write_model

GgufOf = Callable[[str], Path]
"""Type of the matrices -> the file."""


@pytest.fixture(scope="session")
def gguf_of(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> GgufOf:
    """Write the shipped checkpoint once per type."""
    folder, made = tmp_path_factory.mktemp("gguf"), dict[str, Path]()

    def write(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_model(shipped, folder / f"{kind}.gguf", kinds=all_of(kind))
        return made[kind]

    return write
