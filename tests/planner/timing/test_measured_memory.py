"""The memory model against published measurements: what vLLM had left for its cache on GPUs that held N layers.

One point of a series calibrates the device (`fixed_overhead_bytes`: whatever is not weights, cache and workspace);
from then on the planner must know what every other number of layers leaves for the cache.

On A100 and L4 what weights and cache fill together is a constant (0.2 and 0.7 %). On the T4 it shrinks by 0.14 GiB with
every layer, as if a layer took 8 % more than its weights; the measurements do not say why, and one constant per device
does not follow it, so its error reaches 4 %.
"""

import json
from bisect import bisect_left
from pathlib import Path
from typing import Any

import pytest

from planner.problem.build import build_problem
from plans.cluster import Device
from plans.memory import StageMemory, stage_memory
from plans.profile import ModelProfile
from plans.stages import StageRange
from plans.workload import Workload
from tests.planner.cases import cluster, device, tiny_profile, workload

MEASURED = json.loads((Path(__file__).parent / "measured_memory.json").read_text())
SERIES = {f"{series['model']} on {series['device']}": series for series in MEASURED["series"]}
ALLOWED = {"a100": 0.01, "l4": 0.01, "t4": 0.05}


def profile_of(series: dict[str, Any]) -> ModelProfile:
    """The model with as many layers as the largest measured stage; vLLM ran it in fp16."""
    layers = len(series["blocks_by_layers"])
    return tiny_profile(**series["config"], num_hidden_layers=layers, vocab_size=32000, dtype="float16")


def serving(context_tokens: int) -> Workload:
    return workload(context_tokens=context_tokens, dtype="fp16", kv_cache_dtype="fp16")


def needed(profile: ModelProfile, num_layers: int, context_tokens: int) -> StageMemory:
    """What a stage in the middle needs."""
    middle = StageRange("cuda:0", 0, num_layers, has_embedding=False, has_head=False)
    return stage_memory(profile, workload=serving(context_tokens), stage=middle)


def weights_and_cache(memory: StageMemory) -> int:
    return memory.weight_bytes + memory.kv_cache_bytes


def measured(series: dict[str, Any], profile: ModelProfile) -> list[StageMemory]:
    """What was on the GPU, by number of layers."""
    blocks = enumerate(series["blocks_by_layers"], start=1)
    return [needed(profile, layers, count * MEASURED["block_tokens"]) for layers, count in blocks]


def calibrated(series: dict[str, Any], point: StageMemory) -> Device:
    size = series["nominal_gib"] << 30
    overhead = size - point.total_bytes
    return device("gpu", kind="cuda", memory_bytes=size, budget_bytes=size, fixed_overhead_bytes=overhead)


def largest_context(profile: ModelProfile, gpu: Device, num_layers: int) -> int:
    """The longest context with which the planner lets a stage of so many layers onto the device."""

    def is_too_long(context: int) -> bool:
        problem = build_problem(profile, workload=serving(context), cluster=cluster(gpu))
        return not problem.allows(0, 0, num_layers, embedding=False, head=False)

    return 256 + bisect_left(range(257, 1 << 24), x=True, key=is_too_long)


@pytest.mark.parametrize("name", SERIES)
def test_layers_and_cache_have_the_published_sizes(name: str) -> None:
    layer = profile_of(SERIES[name]).layers[0]
    assert layer.parameters == SERIES[name]["parameters_per_layer"]
    assert layer.kv_bytes_per_token == SERIES[name]["kv_bytes_per_token_per_layer"]


@pytest.mark.parametrize("name", SERIES)
def test_one_measured_point_predicts_weights_and_cache_of_all_others(name: str) -> None:
    series = SERIES[name]
    profile = profile_of(series)
    truth = measured(series, profile)
    for point in (truth[0], truth[len(truth) // 2], truth[-1]):
        gpu = calibrated(series, point)
        for num_layers, seen in enumerate(truth, start=1):
            said = needed(profile, num_layers, largest_context(profile, gpu, num_layers))
            assert weights_and_cache(said) == pytest.approx(weights_and_cache(seen), rel=ALLOWED[series["device"]])
