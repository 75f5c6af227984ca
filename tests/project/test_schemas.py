"""The JSON Schemas in docs/ are what the models say."""

from pathlib import Path

import pytest

from plans.schemas import MODELS, schema_text

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_committed_schema_is_generated_from_the_model(name: str) -> None:
    committed = (SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(name), "run: python -m plans.schemas docs/schemas"


def test_no_schema_is_left_behind() -> None:
    assert {path.name for path in SCHEMAS.iterdir()} == {f"{name}.schema.json" for name in MODELS}
