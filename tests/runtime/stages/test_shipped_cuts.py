"""The shipped checkpoint, cut in every possible way into one, two and three stages."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parity import CPU, all_cuts, assert_same, model_step, stages_step, trace

from plans.checkpoint.folder import open_checkpoint
from plans.stages import StageRange
from runtime.reading.families import parse_model_config
from runtime.reading.tensors import FolderTensors
from runtime.stages.loading import load_chain
from runtime.stages.stage import build_stage

CUTS = [cut for num_stages in (1, 2, 3) for cut in all_cuts(7, num_stages)]
WORST = next(cut for cut in CUTS if [s.num_layers for s in cut] == [0, 7, 0])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Traces = Callable[[torch.dtype], list[torch.Tensor]]


def cut_name(cut: tuple[StageRange, ...]) -> str:
    return "-".join(f"{'e' * s.has_embedding}{s.num_layers}{'h' * s.has_head}" for s in cut)


@pytest.fixture(scope="module")
def tensors(shipped: Path) -> FolderTensors:
    return FolderTensors(open_checkpoint(shipped))


def test_there_are_all_37_cuts_of_nine_units() -> None:
    assert len(set(CUTS)) == 1 + 8 + 28


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", CUTS, ids=cut_name)
def test_every_cut_as_a_chain_equals_the_unsplit_model(
    cut: tuple[StageRange, ...], dtype: str, shipped: Path, tensors: FolderTensors, shipped_trace: Traces
) -> None:
    config = parse_model_config(open_checkpoint(shipped).config.raw)
    chain = load_chain(config, cut, tensors, dtype=dtype)
    assert_same(shipped_trace(DTYPES[dtype]), trace(model_step(chain), vocab_size=config.vocab_size, num_tokens=64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", CUTS, ids=cut_name)
def test_every_cut_as_separate_stages_equals_the_unsplit_model(
    cut: tuple[StageRange, ...], dtype: str, shipped: Path, tensors: FolderTensors, shipped_trace: Traces
) -> None:
    config = parse_model_config(open_checkpoint(shipped).config.raw)
    stages = [build_stage(config, spec, tensors, dtype=DTYPES[dtype], device=CPU) for spec in cut]
    num_tokens = 64 if cut == WORST else 6
    found = trace(stages_step(stages), vocab_size=config.vocab_size, num_tokens=num_tokens)
    assert_same(shipped_trace(DTYPES[dtype])[: len(found)], found)
