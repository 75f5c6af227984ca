"""The memory model, worked by hand in bytes."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.cluster import Host
from plans.memory import (
    StageMemory,
    device_overhead_bytes,
    end_activation_bytes,
    layer_activation_bytes,
    layer_kv_bytes,
    stage_memory,
    tied_table_bytes,
)
from plans.profile import ModelProfile
from plans.stages import StageRange
from tests.planner.cases import cluster, device, tiny_profile, workload

PROFILE = tiny_profile()
LAYER_BYTES = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32)
TABLE_BYTES = 2 * 64 * 32


def needed(profile: ModelProfile = PROFILE, *, load: dict[str, Any] | None = None, **changes: Any) -> StageMemory:
    stage = replace(StageRange.whole(4), **changes)
    return stage_memory(profile, workload=workload(**(load or {})), stage=stage, overhead_bytes=7)


def test_weights_are_those_of_the_units() -> None:
    assert needed().weight_bytes == 4 * LAYER_BYTES + 2 * TABLE_BYTES + 64
    assert needed(has_embedding=False, has_head=False).weight_bytes == 4 * LAYER_BYTES
    assert needed(end_layer=0, has_head=False).weight_bytes == TABLE_BYTES


def test_a_tied_table_counts_once_on_one_device_and_twice_on_two() -> None:
    tied = tiny_profile(tie_word_embeddings=True)
    first = needed(tied, has_head=False, end_layer=2).weight_bytes
    second = needed(tied, has_embedding=False, start_layer=2).weight_bytes
    assert tied_table_bytes(tied) == TABLE_BYTES
    assert first + second == needed(tied).weight_bytes + TABLE_BYTES


def test_the_cache_grows_with_context_batch_and_requests_in_flight() -> None:
    per_token = 2 * 2 * 8 * 2
    assert needed().kv_cache_bytes == 4 * 512 * per_token
    assert needed(load={"batch_size": 3, "requests_in_flight": 2}).kv_cache_bytes == 4 * 512 * per_token * 6
    assert needed(end_layer=0).kv_cache_bytes == 0


def test_a_window_bounds_the_cache() -> None:
    layer = tiny_profile(sliding_window=100).layers[0]
    assert layer_kv_bytes(layer, workload()) == 100 * 64
    assert layer_kv_bytes(layer, workload(context_tokens=256)) == 100 * 64
    assert layer_kv_bytes(PROFILE.layers[0], workload(context_tokens=256)) == 256 * 64


def test_the_workspace_is_that_of_the_largest_unit_for_one_chunk() -> None:
    load = workload(batch_size=2, prefill_chunk_tokens=10)
    mlp = 2 * 32 + 3 * 48
    assert layer_activation_bytes(PROFILE, load) == 20 * (mlp * 2 + 4 * 32)
    assert end_activation_bytes(PROFILE, load, has_head=False) == 20 * 32 * 2
    assert end_activation_bytes(PROFILE, load, has_head=True) == 20 * 32 * 2 + 2 * 64 * 6
    alone = needed(end_layer=0, has_head=False, load={"prefill_chunk_tokens": 10})
    assert alone.activation_bytes == 10 * 32 * 2


def test_a_process_is_paid_for_once_per_host_or_once_per_stage() -> None:
    host = Host(name="local", process_overhead_bytes=100)
    gpu = device("gpu", kind="cuda", fixed_overhead_bytes=50)
    parts = cluster(gpu, device("cpu#0", fixed_overhead_bytes=5), device("cpu#1"), hosts=(host,))
    shared = [device_overhead_bytes(d, parts, is_process_per_stage=False) for d in parts.devices]
    apart = [device_overhead_bytes(d, parts, is_process_per_stage=True) for d in parts.devices]
    assert shared == [50, 105, 0]
    assert apart == [50, 105, 100]


@given(cut=st.integers(0, 4), context=st.integers(256, 10_000), batch=st.integers(1, 8))
def test_weights_and_cache_of_two_stages_are_those_of_the_whole(cut: int, context: int, batch: int) -> None:
    load = {"context_tokens": context, "batch_size": batch}
    first = needed(end_layer=cut, has_head=False, load=load)
    second = needed(start_layer=cut, has_embedding=False, load=load)
    whole = needed(load=load)
    assert first.weight_bytes + second.weight_bytes == whole.weight_bytes
    assert first.kv_cache_bytes + second.kv_cache_bytes == whole.kv_cache_bytes
    assert max(first.activation_bytes, second.activation_bytes) == whole.activation_bytes
    assert whole.total_bytes == sum((whole.weight_bytes, whole.kv_cache_bytes, whole.activation_bytes, 7))


@pytest.mark.parametrize("execution", [True, False])
def test_more_memory_is_never_needed_for_less(execution: bool) -> None:
    totals = [needed(end_layer=count, has_head=False).total_bytes for count in range(5)]
    assert totals == sorted(totals)
