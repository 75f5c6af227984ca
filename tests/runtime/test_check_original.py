"""`llamarun check` of weights that were rounded: equal to the rounded model, and so far from the original."""

import json
from pathlib import Path

import pytest

from exporter import export
from tests.conftest import RunCommand
from tests.exporter.packing_helpers import packed_plan

CPUS = ("cpu:0", "cpu:1", "cpu:2")


@pytest.fixture(scope="module")
def rounded(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint in int4, in three stages."""
    folder = tmp_path_factory.mktemp("rounded") / "int4"
    plan = packed_plan(shipped, [3, 2, 2], bits=4, devices=CPUS, hosts=["here"] * 3)
    export(plan, model=shipped, output=folder)
    return folder


def test_a_rounded_export_is_the_unsplit_rounded_model_bit_for_bit(rounded: Path, run_command: RunCommand) -> None:
    found = run_command("llamarun", "check", rounded, "--against", rounded, "-n", 8, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["is_identical"]


def test_against_the_original_it_says_how_far_it_is_and_that_is_no_error(
    shipped: Path, rounded: Path, run_command: RunCommand
) -> None:
    found = run_command("llamarun", "check", rounded, "--against", shipped, "-n", 16)
    assert found.code == 0, found.err
    assert "mean KL to the original: 0.0" in found.out
    assert "both computed in fp32" in found.err
    told = run_command("llamarun", "check", rounded, "--against", shipped, "-n", 16, "--json")
    numbers = json.loads(told.out)
    assert 0.002 < numbers["mean_kl"] < 0.1
    assert 0 < numbers["num_different"] < numbers["num_tokens"] / 4


def test_a_text_can_be_given_to_compare_on(
    shipped: Path, rounded: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    text = tmp_path / "text.py"
    text.write_text("import os\n\nfor name in sorted(os.listdir('.')):\n    print(name)\n" * 10)
    found = run_command("llamarun", "check", rounded, "--against", shipped, "--text", text, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["num_tokens"] > 100
    plain = run_command("llamarun", "check", shipped, "--against", shipped, "--text", text)
    assert plain.code == 2
    assert "--text belongs to packed weights" in plain.err
