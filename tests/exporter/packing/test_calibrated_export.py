"""Exports calibrated on a text: less harm than rounding to nearest, the same bytes again, and what verify can tell."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from export_helpers import make_plan, names, tree
from packing_helpers import dequantised, edit_tensor, packed_plan

from exporter import export, verify
from plans.errors import InputError, IntegrityError, UsageError
from tests.conftest import RunCommand

Models = Callable[..., Path]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def model(models: Models, shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the shipped tokenizer."""
    source = models(hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=4096, num_attention_heads=2)
    folder = shutil.copytree(source, tmp_path_factory.mktemp("calibrated") / "model")
    for name in TOKENIZER:
        shutil.copy(shipped / name, folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About three windows of 128 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def function_{i}(value: int) -> int:\n    return value * {i}\n" for i in range(40)))
    return path


def calibrated(model: Path, text: Path, output: Path, **options: Any) -> Any:
    return export(packed_plan(model, [2, 1], bits=[4, 16, 8]), model=model, output=output, calibrate_on=text, **options)


def test_equal_text_gives_equal_bytes_whatever_the_threads(model: Path, text: Path, tmp_path: Path) -> None:
    import torch

    first, before = calibrated(model, text, tmp_path / "1", threads=1), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for threads in (2, 4):
            assert calibrated(model, text, tmp_path / str(threads), threads=threads) == first
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "4")


def test_the_manifest_says_the_text_and_how_far_every_layer_is(model: Path, text: Path, tmp_path: Path) -> None:
    said: list[str] = []
    packing = calibrated(model, text, tmp_path / "out", warn=said.append).packing
    assert (packing.method, packing.text.size) == ("gptq", text.stat().st_size)
    assert packing.text.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert [(unit.index, unit.scheme) for unit in packing.units] == [(0, "int4 g32"), (2, "int8 g32")]
    assert f"has {packing.text.num_tokens} tokens to calibrate on" in said[0]
    assert packing.text.num_tokens % 128 == 0


def test_what_a_text_makes_of_the_weights_changes_less_than_by_rounding_to_nearest(
    model: Path, text: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = packed_plan(model, [3], bits=4)
    for output, on in (("nearest", None), ("calibrated", text)):
        export(plan, model=model, output=tmp_path / output, calibrate_on=on)
    ids = torch.tensor([AutoTokenizer.from_pretrained(model)(text.read_text())["input_ids"][:128]])
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def states(folder: Path) -> Any:
        reference.load_state_dict(dequantised(folder, dtype="float32"))
        with torch.no_grad():
            return reference.model(ids).last_hidden_state

    original = states(model)
    changes = {name: (states(tmp_path / name) - original).square().mean() for name in ("nearest", "calibrated")}
    assert changes["calibrated"] < 0.7 * changes["nearest"]


def test_verify_tells_other_weights_from_the_ones_that_were_calibrated(model: Path, text: Path, tmp_path: Path) -> None:
    calibrated(model, text, tmp_path / "out")
    assert verify(tmp_path / "out", model=model).method == "gptq"
    other = shutil.copytree(model, tmp_path / "other")
    edit_tensor(other, "model.layers.2.mlp.up_proj.weight", place=77, change=0.02)
    with pytest.raises(IntegrityError, match=r"packed weights of layer 2 are .* the manifest says"):
        verify(tmp_path / "out", model=other)


def test_a_text_that_cannot_be_used_is_refused_before_anything_is_written(
    model: Path, text: Path, tmp_path: Path, models: Models
) -> None:
    bad = {"missing.txt": None, "empty.txt": b" \n", "latin.txt": b"caf\xe9"}
    for name, data in bad.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            calibrated(model, tmp_path / name, tmp_path / "out")
    with pytest.raises(UsageError, match="belongs to packed weights"):
        export(make_plan(model, [3]), model=model, output=tmp_path / "out", calibrate_on=text)
    mute = models(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2)
    with pytest.raises(InputError, match="tokenizer"):
        calibrated(mute, text, tmp_path / "out")
    assert names(tmp_path) == ["empty.txt", "latin.txt"]


def test_the_commands_calibrate_and_verify_and_say_how(
    model: Path, text: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(packed_plan(model, [2, 1], bits=4).to_json())
    options = ("--model", model, "-o", tmp_path / "out", "--calibration-text", text)
    done = run_command("llamaplan", "export", plan, *options)
    assert done.code == 0, done.err
    assert "calibrated on" in done.out
    assert "int4 g32" in done.out
    checked = run_command("llamaplan", "verify", tmp_path / "out", "--model", model)
    assert checked.code == 0, checked.err
    assert "the packed ones as far from the model's as the manifest says" in checked.out


def test_windows_come_from_all_over_a_long_text_and_from_the_beginning_of_a_short_one(
    model: Path, tmp_path: Path
) -> None:
    from exporter.calibrate.text import MAX_TOKENS, read_text

    def windows(text: str) -> Any:
        path = tmp_path / "text.txt"
        path.write_text(text)
        return read_text(path, folder=model, vocab_size=4096, context_tokens=128)

    line = "value = [1, 2, 3]\n"
    short = windows(line * 40)
    assert len({len(window) for window in short.windows}) == 1
    long = windows(line * 6000 + "import os\n" * 12000)
    assert long.record.num_tokens == MAX_TOKENS
    assert long.windows[0] == short.windows[0]
    assert long.windows[0] != long.windows[-1]
    assert {window[0] for window in long.windows} == {1}, "each begins as the tokenizer begins a text"
    assert windows("x").windows[0][:-1] == (1,)
