"""The shipped checkpoint with packed weights, cut in every way."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from parity import CPU, all_cuts, as_stage, assert_same, model_step, reference_model, stages_step, trace
from transformers import PreTrainedModel

from plans.checkpoint.folder import open_checkpoint
from runtime.reading.families import parse_model_config
from runtime.reading.tensors import FolderTensors
from runtime.stages.loading import load_chain
from runtime.stages.stage import build_stage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCAB, UNITS = 2048, 9

Reference = Callable[[str, str], PreTrainedModel]


@dataclass(frozen=True, slots=True)
class Moment:
    """One forward of the unsplit model: what came in, and the states behind every unit, the last being logits."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    states: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture(scope="module")
def reference(packed_shipped: Callable[[str], Path]) -> Reference:
    """Kind and dtype -> the model as transformers with compressed-tensors loads it."""
    return cache(lambda kind, dtype: reference_model(packed_shipped(kind), dtype=DTYPES[dtype]))


def recorded(model: PreTrainedModel, *, num_tokens: int) -> list[Moment]:
    """Run the parity protocol and keep what every unit computes."""
    moments: list[Moment] = []
    units = [model.base_model.embed_tokens, *model.base_model.layers, model.lm_head]
    hooks = [unit.register_forward_hook(lambda _m, _a, out: moments[-1].states.append(out)) for unit in units]
    step = model_step(model)

    def watched(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        moments.append(Moment(ids, mask, positions))
        return step(ids, mask, positions)

    trace(watched, vocab_size=VOCAB, num_tokens=num_tokens)
    for hook in hooks:
        hook.remove()
    return moments


def test_every_stage_of_every_cut_computes_its_part_of_the_unsplit_model(
    reference: Reference, packed_shipped: Callable[[str], Path]
) -> None:
    """Any cut is a chain of these 45 stages; each gives the states behind its last unit for those before its first."""
    checkpoint = open_checkpoint(packed_shipped("mixed"))
    config, tensors = parse_model_config(checkpoint.config.raw), FolderTensors(checkpoint)
    moments = recorded(reference("mixed", "bf16"), num_tokens=2)
    assert [len(moment.states) for moment in moments] == [UNITS] * 5
    for start, end in [(a, b) for a in range(UNITS) for b in range(a + 1, UNITS + 1)]:
        stage = build_stage(config, as_stage(start, end, num_layers=7), tensors, dtype=torch.bfloat16, device=CPU)
        step = stages_step([stage])
        with torch.inference_mode():
            for moment in moments:
                found = step([moment.ids, *moment.states][start], moment.mask, moment.positions)
                assert torch.equal(found, moment.states[end - 1]), (start, end)


@pytest.mark.parametrize(
    ("kind", "dtype", "num_tokens"),
    [
        ("mixed", "bf16", 64),
        *(("mixed", dtype, 4) for dtype in ("fp16", "fp32")),
        *((kind, "bf16", 4) for kind in ("int4", "int8", "int4 g64", "int8 per row", "int4 per row")),
    ],
)
def test_a_chain_of_packed_stages_gives_the_logits_of_greedy_tokens(
    kind: str, dtype: str, num_tokens: int, reference: Reference, packed_shipped: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(packed_shipped(kind))
    cut = list(all_cuts(7, 3))[17]
    config, tensors = parse_model_config(checkpoint.config.raw), FolderTensors(checkpoint)
    chain = load_chain(config, cut, tensors, dtype=dtype)
    found, expected = (
        trace(model_step(model), vocab_size=VOCAB, num_tokens=num_tokens) for model in (chain, reference(kind, dtype))
    )
    assert_same(expected, found)
