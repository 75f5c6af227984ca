"""Fixtures shared by the exporter's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from export_helpers import make_llama, make_plan

from exporter import export


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a tiny random Llama once per configuration."""
    made: dict[str, Path] = {}

    def make(**config: object) -> Path:
        key = repr(sorted(config.items()))
        if key not in made:
            made[key] = make_llama(tmp_path_factory.mktemp("model"), **config)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture
def shards(shipped: Path, tmp_path: Path) -> Path:
    """A fresh export of the shipped checkpoint in three stages, to be damaged at will."""
    export(make_plan(shipped, [3, 2, 2]), model=shipped, output=tmp_path / "shards")
    return tmp_path / "shards"
