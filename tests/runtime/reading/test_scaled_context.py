"""Contexts beyond max_position_embeddings: as far as rope scaling reaches, the same in planning and in running."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import reference_model, some_cut
from transformers import LlamaConfig, PreTrainedConfig

from runtime import load
from runtime.engine.run import generate
from runtime.generate.limits import Limits
from runtime.generate.sampling import Sampling
from tests.conftest import RunCommand

SCALINGS: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
}


@pytest.mark.row("P19")
@pytest.mark.parametrize("kind", SCALINGS)
def test_tokens_beyond_the_trained_length_are_those_of_generate(
    kind: str, make_checkpoint: Callable[[PreTrainedConfig], Path], tiny_config: LlamaConfig
) -> None:
    shape = tiny_config.to_dict() | {"max_position_embeddings": 24, "eos_token_id": None}
    shape["rope_parameters"] = {**SCALINGS[kind], "rope_theta": 10000.0}
    folder = make_checkpoint(LlamaConfig.from_dict(shape))
    prompt = list(range(4, 20))
    expected = reference_model(folder, dtype=torch.float32).generate(
        torch.tensor([prompt]), max_new_tokens=80, do_sample=False
    )
    chain = load(folder, stages=some_cut(4, 3, seed=5))
    found = generate(chain, [prompt], sampling=Sampling(), limits=Limits(context_tokens=96, max_tokens=80))
    assert [*prompt, *found.sequences[0].token_ids] == expected[0].tolist()


@pytest.fixture(scope="module")
def scaled(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, 1024 tokens, with Qwen's recipe for YaRN: 4 x 1024."""
    folder = tmp_path_factory.mktemp("scaled") / "model"
    shutil.copytree(shipped, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.row("P19")
def test_a_command_runs_up_to_where_the_scaling_reaches(scaled: Path, run_command: RunCommand) -> None:
    prompt_ids = ",".join(["5"] * 1100)
    done = run_command("llamarun", "generate", scaled, "--prompt-ids", prompt_ids, "-n", 2, "-c", 4096, "--json")
    assert (done.code, json.loads(done.out)["new_tokens"]) == (0, 2), done.err


@pytest.mark.row("P19", "P8")
@pytest.mark.parametrize("command", ["generate", "chat", "batch", "bench", "serve"])
def test_every_command_that_runs_refuses_one_token_more(
    command: str, scaled: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "x"}\n')
    batch = [lines, "-o", tmp_path / "out.jsonl"]
    rest = {"generate": ["-p", "x"], "batch": batch, "serve": ["--port", 0]}.get(command, [])
    done = run_command("llamarun", command, scaled, *rest, "-c", 4097)
    assert done.code == 2
    assert "4097 tokens are more than the model was trained for (1024) and its rope scaling reaches 4096" in done.err


@pytest.mark.row("P19", "P8")
@pytest.mark.parametrize(("context", "is_said"), [(4096, False), (4097, True)])
def test_solve_and_emit_warn_where_the_engine_refuses(
    context: int, is_said: bool, scaled: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    solved = run_command("llamaplan", "solve", scaled, "--device", "cuda:0=1GiB", "-c", context, "-o", plan)
    assert ("warning: 4097 tokens are more" in solved.err, solved.code) == (is_said, 0), solved.err
    for engine, code in (("vllm", 2), ("llama.cpp", 0), ("torchrun", 2)):
        found = run_command("llamaplan", "emit", plan, "--for", engine, "-o", tmp_path / engine)
        said = "its rope scaling reaches 4096" in found.err
        assert (said, found.code) == (is_said, code if is_said else 0), found.err
