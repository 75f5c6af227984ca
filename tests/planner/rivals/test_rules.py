"""Other engines' rules against the vectors of their own tests, and accelerate's against the library itself."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planner.rivals import rules
from plans.cluster import Cluster, Device
from plans.engines import rules as rules_counts
from plans.engines.spelling import parse_partition
from plans.errors import UsageError
from plans.profile import ModelProfile
from plans.stages import StageRange
from tests.planner.cases import TINY, cluster, device, tiny_profile

VLLM = [  # vLLM, tests/distributed/test_pipeline_partition.py, test_uneven_auto_partition
    (3, 2, [(0, 2), (2, 3)]),
    (4, 3, [(0, 1), (1, 3), (3, 4)]),
    (5, 3, [(0, 2), (2, 4), (4, 5)]),
]
VLLM_OVERRIDES = [(22, "5,6,5,6"), (20, "4,6,6,4")]  # the same file, test_custom_layer_partition
EXO = [  # exo, src/exo/master/tests/test_placement_utils.py, test_get_shard_assignments
    ((500, 500, 1000), 12, (3, 3, 6)),
    ((500, 500, 500), 12, (4, 4, 4)),
    ((312, 518, 1024), 12, (2, 3, 7)),
    ((900, 50, 50), 20, (18, 1, 1)),
]


def gpu(name: str, **changes: Any) -> Device:
    """A CUDA device of 1 GiB on the host `local`."""
    return device(name, kind="cuda", **changes)


def gpus(*budgets: int) -> Cluster:
    """CUDA devices g0, g1, ... with these budgets."""
    return cluster(*(gpu(f"g{i}", budget_bytes=budget) for i, budget in enumerate(budgets)))


def layers_of(split: rules.Split) -> tuple[int, ...]:
    assert not split.reason
    return tuple(stage.end_layer - stage.start_layer for stage in split.stages)


def assert_chain(stages: Sequence[StageRange], num_layers: int) -> None:
    assert [s.has_embedding for s in stages] == [True] + [False] * (len(stages) - 1)
    assert [s.has_head for s in stages] == [False] * (len(stages) - 1) + [True]
    bounds = [stages[0].start_layer, *(s.end_layer for s in stages)]
    assert (bounds[0], bounds[-1]) == (0, num_layers)
    assert [s.start_layer for s in stages] == bounds[:-1]


@pytest.mark.parametrize(("num_layers", "num_ranks", "expected"), VLLM)
def test_vllm_splits_as_its_own_tests_say(num_layers: int, num_ranks: int, expected: list[tuple[int, int]]) -> None:
    split = rules.vllm(tiny_profile(num_hidden_layers=num_layers), gpus(*[1 << 30] * num_ranks))
    assert [(s.start_layer, s.end_layer) for s in split.stages] == expected
    assert_chain(split.stages, num_layers)


@pytest.mark.parametrize(("num_layers", "partition"), VLLM_OVERRIDES)
def test_an_override_of_vllm_is_taken_as_it_is(num_layers: int, partition: str) -> None:
    read = parse_partition(f"vllm:{partition}", num_layers=num_layers)
    split = rules.from_partition(read.engine, read.ranges, cluster=gpus(*[1 << 30] * 4))
    assert ",".join(map(str, layers_of(split))) == partition


@pytest.mark.parametrize(("memory", "num_layers", "expected"), EXO)
def test_exo_splits_as_its_own_tests_say(memory: tuple[int, ...], num_layers: int, expected: tuple[int, ...]) -> None:
    assert rules_counts.exo_layers(num_layers, memory_bytes=memory) == expected
    assert layers_of(rules.exo(tiny_profile(num_hidden_layers=num_layers), gpus(*memory))) == expected


@given(st.integers(1, 130), st.integers(1, 40))
def test_equal_counts_place_the_remainder_where_each_engine_does(num_layers: int, num_ranks: int) -> None:
    base, extra = divmod(num_layers, num_ranks)
    vllm = [base] * num_ranks  # as vLLM's loop: one each to [-2], [-3], ...
    for position in range(2, extra + 2):
        vllm[-position] += 1
    assert list(rules_counts.vllm_layers(num_layers, num_ranks=num_ranks)) == vllm
    sglang = [base] * (num_ranks - extra) + [base + 1] * extra
    assert list(rules_counts.sglang_layers(num_layers, num_ranks=num_ranks)) == sglang
    tensor_split = [len(part) for part in torch.tensor_split(torch.arange(num_layers), num_ranks)]
    assert list(rules_counts.tensorrt_llm_layers(num_layers, num_ranks=num_ranks)) == tensor_split


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=12).filter(any), st.integers(12, 130))
def test_exo_gives_every_node_a_layer_and_nobody_more_than_a_share_and_one(memory: list[int], num_layers: int) -> None:
    layers = rules_counts.exo_layers(num_layers, memory_bytes=memory)
    assert sum(layers) == num_layers
    assert min(layers) >= 1
    assert all(n <= max(1, size * num_layers / sum(memory) + 1) for n, size in zip(layers, memory, strict=True))


@given(st.lists(st.integers(0, 2**45), min_size=1, max_size=8).filter(any), st.integers(1, 130), st.integers(0, 131))
def test_llama_cpp_owners_are_its_upper_bound_in_single_precision(
    split: list[int], num_layers: int, num_gpu_layers: int
) -> None:
    owners = rules_counts.llama_cpp_owners(num_layers, split=split, num_gpu_layers=num_gpu_layers)
    count = min(num_gpu_layers, num_layers + 1)
    ends = np.cumsum(np.array(split, dtype=np.float32), dtype=np.float32)
    places = np.arange(count, dtype=np.float32) / np.float32(max(count, 1))
    expected = np.searchsorted(ends / ends[-1], places.astype(np.float32), side="right")
    assert owners == (*[None] * (num_layers + 1 - count), *expected.tolist())


def test_llama_cpp_keeps_the_token_table_and_what_is_not_offloaded_on_the_cpu() -> None:
    parts = cluster(gpu("g0"), gpu("g1"), device("cpu"))
    split = rules.llama_cpp(tiny_profile(num_hidden_layers=6), parts, num_gpu_layers=5)
    assert split.stages == (
        StageRange("cpu", 0, 2, True, False),
        StageRange("g0", 2, 5, False, False),
        StageRange("g1", 5, 6, False, True),
    )
    whole = rules.llama_cpp(tiny_profile(num_hidden_layers=6), parts)
    assert [stage.device for stage in whole.stages] == ["cpu", "g0", "g1"]
    assert whole.stages[0] == StageRange("cpu", 0, 0, True, False)


def test_engines_for_accelerators_leave_the_cpu_out() -> None:
    parts = cluster(gpu("g0"), device("cpu"), gpu("g1"))
    for rule in (rules.vllm, rules.sglang, rules.tensorrt_llm):
        assert [stage.device for stage in rule(tiny_profile(), parts).stages] == ["g0", "g1"]


@pytest.mark.parametrize(
    ("rule", "parts", "says"),
    [
        (rules.vllm, gpus(*[1 << 30] * 5), "4 layers do not go round 5 ranks"),
        (rules.exo, gpus(*[1 << 30] * 5), "a layer for each of the 5"),
        (rules.exo, gpus(0, 0), "needs memory"),
        (rules.llama_cpp, gpus(0), "no device offers memory"),
        (rules.accelerate_auto, cluster(device("a"), device("b")), "one CPU, there are 2"),
        (rules.accelerate_auto, cluster(gpu("a"), gpu("b", host="far")), "one host"),
        (rules.accelerate_auto, gpus(10_000), "to the disk"),
    ],
)
def test_a_rule_that_cannot_cut_says_why(rule: Any, parts: Cluster, says: str) -> None:
    split = rule(tiny_profile(), parts)
    assert not split.stages
    assert says in split.reason


def test_a_partition_by_device_names_is_placed_on_those_devices() -> None:
    parts = cluster(gpu("g0"), gpu("g1"), device("host-cpu"))
    text = '{"model.layers.0": 1, "model.layers.1": 1, "model.layers.2": "cuda:0", "model.layers.3": "cpu"}'
    read = parse_partition(f"accelerate:{text}", num_layers=4)
    split = rules.from_partition(read.engine, read.ranges, cluster=parts, devices=read.devices)
    assert [(s.device, s.start_layer, s.end_layer) for s in split.stages] == [
        ("g1", 0, 2), ("g0", 2, 3), ("host-cpu", 3, 4),
    ]  # fmt: skip


def test_a_partition_for_devices_that_are_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match=r"names 3 ranks, there are 2"):
        rules.from_partition("vllm", [(0, 1), (1, 2), (2, 4)], cluster=gpus(1, 1))
    with pytest.raises(UsageError, match="names device 7"):
        rules.from_partition("accelerate", [(0, 4)], cluster=gpus(1, 1), devices=["7"])
    with pytest.raises(UsageError, match="leaves layers on the CPU"):
        rules.from_partition("llama.cpp", [(0, 1), (1, 4)], cluster=gpus(1, 1), has_cpu_part=True)


@pytest.fixture
def accelerate() -> Iterator[Any]:
    """The library, silenced: it warns about every GPU that is not there."""
    library = pytest.importorskip("accelerate", reason="accelerate is not installed")
    logging.disable(logging.WARNING)
    yield library
    logging.disable(logging.NOTSET)


LIVE_CASES = [
    (seed, is_tied, num_gpus, has_cpu)
    for seed in range(6)
    for is_tied in (False, True)
    for num_gpus in (0, 1, 2, 4)
    for has_cpu in (False, True)
    if num_gpus or has_cpu
]


@pytest.mark.filterwarnings("ignore:Current model requires")
def test_accelerate_itself_places_the_same_units_on_the_same_devices(accelerate: Any) -> None:
    outcomes = {"one": 0, "several": 0, "disk": 0}
    for seed, is_tied, num_gpus, has_cpu in LIVE_CASES:
        rng = np.random.default_rng([seed, is_tied, num_gpus, has_cpu])
        profile, model = _random_model(rng, is_tied=is_tied)
        limits = {i: int(profile.total_weight_bytes * rng.choice([0.1, 0.4, 0.7, 1.5])) + 1 for i in range(num_gpus)}
        parts = [gpu(f"g{i}", budget_bytes=size) for i, size in limits.items()]
        cpu = int(profile.total_weight_bytes * rng.uniform(0.3, 2.5))
        parts += [device("cpu", budget_bytes=cpu)] * has_cpu
        for rule in (rules.accelerate_auto, rules.accelerate_balanced):
            memory: dict[int | str, int] = {**limits, **({"cpu": cpu} if has_cpu else {})}
            if rule is rules.accelerate_balanced:
                memory = accelerate.utils.get_balanced_memory(model, memory, ["LlamaDecoderLayer"])
            placed = accelerate.infer_auto_device_map(model, memory, ["LlamaDecoderLayer"], clean_result=False)
            split = rule(profile, cluster(*parts))
            assert list(split.stages) == _expected(placed, profile.model.num_hidden_layers)
            outcomes["disk" if split.reason else "one" if len(split.stages) == 1 else "several"] += 1
    assert min(outcomes.values()) > 10, outcomes  # every kind of answer was compared


def _random_model(rng: np.random.Generator, *, is_tied: bool) -> tuple[ModelProfile, Any]:
    """A tiny Llama without memory behind its weights, and our profile of the same configuration."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    changes = {
        "num_hidden_layers": int(rng.integers(1, 9)),
        "vocab_size": int(rng.choice([16, 300, 1500])),
        "intermediate_size": int(rng.choice([16, 96])),
        "tie_word_embeddings": is_tied,
    }
    config = LlamaConfig(**{key: value for key, value in (TINY | changes).items() if key != "model_type"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    return tiny_profile(**changes), model


def _expected(placed: dict[str, Any], num_layers: int) -> list[StageRange]:
    """The library's device_map as a chain; empty where something went to the disk."""

    def owner(name: str) -> str:
        while name not in placed:
            assert name
            name = name.rpartition(".")[0]
        return str(placed[name]) if isinstance(placed[name], str) else f"g{placed[name]}"

    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(num_layers)), "lm_head"]
    owners = [owner(name) for name in names]
    others = [owner("model.norm"), owner("model.rotary_emb")]
    return [] if "disk" in (*owners, *others) else list(rules.chain_of(owners))
