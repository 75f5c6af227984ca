"""Sensitivities: what a replay computes, what is measured, and that an interrupted measurement goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.measure.replay import Replay, divergence
from planner.measure.sensitivity import Rounding, measure_sensitivity, subject_of, windows_of
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.units import Checkpoint
from plans.errors import InputError
from plans.packed.scheme import INT4
from plans.sensitivity import PartialSensitivity, Sensitivity
from tests.conftest import RunCommand

TEXT = ("def add(a, b):\n    return a + b\n\n\nclass Table:\n    pass\n" * 12).encode()


@pytest.fixture(scope="module")
def checkpoint(shipped: Path) -> Checkpoint:
    return open_checkpoint(shipped)


@pytest.fixture(scope="module")
def windows(checkpoint: Checkpoint) -> torch.Tensor:
    return windows_of(checkpoint, TEXT, num_tokens=64, where="text").view(2, 32)


@pytest.fixture(scope="module")
def measured(checkpoint: Checkpoint, windows: torch.Tensor) -> tuple[Sensitivity, list[PartialSensitivity]]:
    """The whole measurement, and what was kept on the way."""
    kept: list[PartialSensitivity] = []
    known = PartialSensitivity(subject=subject_of(checkpoint, windows, TEXT, dtype=None))
    found = measure_sensitivity(checkpoint, windows, known=known, keep=kept.append, progress=lambda *_: None)
    return found, kept


def test_a_replay_of_what_is_not_changed_diverges_nowhere(checkpoint: Checkpoint, windows: torch.Tensor) -> None:
    replay = Rounding(checkpoint, dtype="bf16").replay(windows)
    assert [replay.divergence({}, first=first) for first in (0, 3, replay.num_layers)] == [0.0, 0.0, 0.0]


def test_a_replay_is_transformers_in_fp32_with_the_rounded_weights(
    shipped: Path, checkpoint: Checkpoint, windows: torch.Tensor
) -> None:
    from transformers import AutoModelForCausalLM

    rounding = Rounding(checkpoint, dtype="bf16")
    changes = rounding.changes((16, 16, 4, 8, 16, 16, 4), head_bits=8)
    plain, other = (AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32).eval() for _ in range(2))
    with torch.no_grad():
        for name, make in changes.items():
            other.get_parameter(name).copy_(make())
        base, found = (torch.log_softmax(model(windows).logits, dim=-1) for model in (plain, other))
    expected = sum(divergence(a, b) for a, b in zip(base, found, strict=True)) / windows.numel()
    assert rounding.replay(windows).divergence(changes, first=2) == pytest.approx(expected, rel=1e-3)


def test_weights_are_rounded_as_the_format_unpacks_them(checkpoint: Checkpoint) -> None:
    rounding = Rounding(checkpoint, dtype="bf16")
    name = "model.layers.1.mlp.up_proj.weight"
    made = rounding.changes((16, 4, *(16,) * 5))[name]()
    weight = rounding.stored(name)
    assert made.dtype == torch.bfloat16
    groups = made.float().view(-1, 32)
    assert all(len(group.unique()) <= 16 for group in groups[:64])
    error = float((made.float() - weight.float()).square().sum() / weight.float().square().sum())
    assert 0.001 < error < 0.02
    assert INT4.can_pack(*weight.shape)


def test_errors_of_single_layers_add_up_to_the_error_of_a_mix(
    checkpoint: Checkpoint, windows: torch.Tensor, measured: tuple[Sensitivity, list[PartialSensitivity]]
) -> None:
    known, _kept = measured
    rounding = Rounding(checkpoint, dtype="bf16")
    replay = rounding.replay(windows)
    for bits in ((4, 8, 8, 4, 8, 8, 8), (8, 4, 4, 8, 4, 4, 4)):
        expected = sum((known.int4 if width == 4 else known.layer_int8)[i] for i, width in enumerate(bits))
        assert replay.divergence(rounding.changes(bits), first=0) == pytest.approx(expected, rel=0.35)


def test_every_part_is_measured_once_and_an_interrupted_run_goes_on(
    checkpoint: Checkpoint, windows: torch.Tensor, measured: tuple[Sensitivity, list[PartialSensitivity]]
) -> None:
    whole, kept = measured
    assert len(kept) == 7 + 2
    assert all(error > 0 for error in (*whole.int4, whole.int8, whole.head_int8 or 0.0))
    again: list[PartialSensitivity] = []
    found = measure_sensitivity(checkpoint, windows, known=kept[6], keep=again.append, progress=lambda *_: None)
    assert len(again) == 2
    assert found == whole


def test_a_long_text_is_read_from_end_to_end_and_a_short_one_from_its_beginning(checkpoint: Checkpoint) -> None:
    text = "".join(f"value_{number} = {number * number}\n" for number in range(20_000))
    long = windows_of(checkpoint, text.encode(), num_tokens=1024, where="text")
    assert long.shape == (2, 512)
    middle = windows_of(checkpoint, text[len(text) // 2 :].encode(), num_tokens=512, where="text")
    assert torch.equal(long[1], middle[0])
    short = windows_of(checkpoint, text[:5000].encode(), num_tokens=1024, where="text")
    assert torch.equal(short.view(-1)[:500], long[0][:500])


@pytest.mark.parametrize(
    ("text", "said"), [(b"x = 1\n", "tokens"), (b"\xff\xfe", "not UTF-8 at byte 0"), (b"a\0" * 99, "NUL")]
)
def test_text_that_is_none_is_refused(checkpoint: Checkpoint, text: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        windows_of(checkpoint, text, num_tokens=64, where="text.txt")


def test_the_command_writes_a_strict_file_that_solve_climbs_by(
    shipped: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    text, sens, plan = tmp_path / "text.txt", tmp_path / "sens.json", tmp_path / "plan.json"
    text.write_bytes(TEXT)
    asked = ("--text", text, "--tokens", 32, "-o", sens)
    done = run_command("llamaplan", "sensitivity", shipped, *asked)
    assert done.code == 0, done.err
    assert "all layers in int4" in done.out
    assert not sens.with_name("sens.json.partial").exists()
    found = Sensitivity.read(sens)
    # What a killed run leaves behind: the file is beside it, and the same command goes on from there.
    half = PartialSensitivity(subject=found.subject, int8=found.int8, head_int8=found.head_int8, int4=found.int4[:5])
    sens.rename(tmp_path / "first.json")
    sens.with_name("sens.json.partial").write_text(half.to_json(), encoding="utf-8")
    again = run_command("llamaplan", "sensitivity", shipped, *asked)
    assert "5 of 7 layers were measured before" in again.err
    assert sens.read_bytes() == (tmp_path / "first.json").read_bytes()

    cluster = Path(__file__).parents[3] / "plans" / "examples" / "demo.json"
    options: tuple[Any, ...] = (shipped, "--cluster", cluster, "-c", "256", "--sensitivity", sens)
    unbounded = run_command("llamaplan", "solve", *options, "--weights", "auto")
    assert unbounded.code == 2
    assert "needs --max-error" in unbounded.err
    budget = 0.6 * sum(found.int4)
    climbed = run_command("llamaplan", "solve", *options, "--weights", "auto", "--max-error", budget, "-o", plan)
    assert climbed.code == 0, climbed.err
    assert "the best of the ladder" in climbed.out
    recorded = json.loads(plan.read_text(encoding="utf-8"))["weights"]
    assert recorded["kind"] == "mixed"
    assert recorded["error"]["expected"] <= recorded["error"]["budget"] == budget
    assert recorded["error"]["sensitivity_sha256"] == found.sha256
    shown = run_command("llamaplan", "show", plan).out
    assert "allowed, the best of the ladder (mean KL per token)" in shown


@pytest.mark.parametrize("family", ["gemma2", "granite", "phi3", "olmo2", "qwen3", "smollm3", "mistral", "qwen2"])
def test_a_replay_computes_every_family(family: str) -> None:
    import transformers

    from plans.stages import StageRange
    from runtime.reading.families import CAUSAL_LM_CLASSES, parse_model_config
    from runtime.stages.loading import load_chain

    torch.manual_seed(0)
    raw: dict[str, Any] = {
        "model_type": family, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64,
        "max_position_embeddings": 64, "pad_token_id": 0, "tie_word_embeddings": False, "initializer_range": 0.3,
    }  # fmt: skip
    config = parse_model_config(raw)
    model = getattr(transformers, CAUSAL_LM_CLASSES[family])(config).eval()
    chain = load_chain(
        config, [StageRange.whole(2)], {name: t.clone() for name, t in model.state_dict().items()}, dtype="fp32"
    )
    ids = torch.arange(1, 17)[None]
    changes = {"model.layers.1.mlp.down_proj.weight": lambda: torch.zeros(32, 64)}
    with torch.no_grad():
        base = torch.log_softmax(model(ids).logits[0], dim=-1)
        model.get_parameter("model.layers.1.mlp.down_proj.weight").zero_()
        expected = divergence(base, torch.log_softmax(model(ids).logits[0], dim=-1)) / 16
    assert Replay(chain, ids).divergence(changes, first=1) == pytest.approx(expected, rel=1e-3)
