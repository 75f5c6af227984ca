"""The time model: worked cases by hand, measured curves, and what must hold for any input."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.timing.costs import CostModel, predict
from planner.timing.roofline import Work, bytes_read, flops
from planner.timing.unit_times import estimate
from plans.cluster import Host, Timings
from plans.errors import InfeasibleError, InputError
from plans.plan import Prediction
from plans.stages import StageRange
from tests.planner.cases import class_link, cluster, device, link, tiny_profile, workload

PROFILE = tiny_profile()
LAYER = PROFILE.layers[0]


def model(*devices: Any, **changes: Any) -> CostModel:
    return CostModel(PROFILE, workload=workload(**changes), cluster=cluster(*(devices or (device("cpu"),))))


def timings(profile: str = "*", **rows: Any) -> Timings:
    return Timings(profile=profile, dtype="bf16", **rows)


# --- roofline -----------------------------------------------------------------------------------------------------


def test_a_decode_step_reads_the_weights_and_the_cache_of_every_sequence() -> None:
    read = bytes_read(LAYER, work=Work(1, 191, 3), profile=PROFILE)
    assert read == LAYER.weight_bytes + 3 * 192 * LAYER.kv_bytes_per_token


def test_decode_is_costed_at_the_prompt_and_half_the_new_tokens() -> None:
    expected = (LAYER.weight_bytes + 192 * LAYER.kv_bytes_per_token) / 1e10 + 1e-6
    assert model(device("cpu", unit_overhead_seconds=1e-6)).decode_seconds(LAYER, "cpu") == pytest.approx(expected)


def test_a_prefill_bound_by_flops_takes_flops_over_rate() -> None:
    slow = device("cpu", flops_per_second={"bf16": 1e6})
    pairs = 128 * 129 // 2
    expected = (128 * LAYER.flops_per_token + pairs * LAYER.attention_flops_per_token_per_context) / 1e6
    assert model(slow).prefill_seconds(LAYER, "cpu") == (pytest.approx(expected),)


@given(past=st.integers(0, 40), tokens=st.integers(1, 40), window=st.one_of(st.none(), st.integers(1, 50)))
def test_attention_counts_the_pairs_a_causal_window_allows(past: int, tokens: int, window: int | None) -> None:
    layer = LAYER.model_copy(update={"kv_window_tokens": window, "flops_per_token": 0})
    pairs = sum(min(past + i, window or 10**9) for i in range(1, tokens + 1))
    assert flops(layer, work=Work(tokens, past, 1)) == pairs * layer.attention_flops_per_token_per_context


def test_chunks_of_a_prefill_do_the_flops_of_the_whole() -> None:
    whole = flops(LAYER, work=Work(128, 0, 2))
    assert sum(flops(LAYER, work=Work(32, past, 2)) for past in range(0, 128, 32)) == whole


def test_the_embedding_reads_rows_and_the_head_its_table_once_per_prompt() -> None:
    costs = model(prefill_chunk_tokens=64)
    assert costs.decode_seconds(PROFILE.embedding, "cpu") == pytest.approx(32 * 2 / 1e10)
    assert costs.prefill_seconds(PROFILE.embedding, "cpu") == (pytest.approx(64 * 32 * 2 / 1e10),) * 2
    head = PROFILE.head.weight_bytes / 1e10
    assert costs.prefill_seconds(PROFILE.head, "cpu") == (0.0, pytest.approx(head))


def test_a_sliding_window_bounds_what_is_read() -> None:
    layer = LAYER.model_copy(update={"kv_window_tokens": 16})
    assert bytes_read(layer, work=Work(1, 191, 1), profile=PROFILE) == layer.weight_bytes + 16 * 32 * 2


def test_a_dtype_the_device_lacks_runs_at_its_fp32_rate() -> None:
    old = device("old", flops_per_second={"fp32": 1e6, "fp16": 8e6})
    new = device("new", flops_per_second={"fp32": 1e6, "bf16": 1e6})
    costs = model(old, new)
    assert costs.prefill_seconds(LAYER, "old") == costs.prefill_seconds(LAYER, "new")


def test_a_larger_batch_touches_more_experts_up_to_all() -> None:
    profile = tiny_profile(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    layer = profile.layers[0].model_copy(update={"kv_bytes_per_token": 0})
    read = [bytes_read(layer, work=Work(1, 0, batch), profile=profile) for batch in (1, 2, 8, 10_000)]
    assert read[0] == layer.decode_read_bytes
    assert read == sorted(read)
    hit = 8 * (1 - (6 / 8) ** 2)  # two tokens choosing 2 of 8 at random
    assert read[1] == pytest.approx(layer.decode_read_bytes + (hit - 2) * 3 * 32 * 48 * 2)
    assert read[3] == pytest.approx(layer.weight_bytes)


def test_identical_layers_cost_identical_floats_and_a_stage_their_exact_multiple() -> None:
    costs = model()
    assert len({costs.decode_seconds(layer, "cpu") for layer in PROFILE.layers}) == 1
    stage = costs.stage_decode_seconds(StageRange("cpu", 0, 3, has_embedding=False, has_head=False))
    assert stage == 3 * costs.decode_seconds(LAYER, "cpu")


# --- measured curves ----------------------------------------------------------------------------------------------


def test_a_measured_curve_is_interpolated_linearly_in_context_and_batch() -> None:
    rows = ((128, 1, 1.0), (256, 1, 2.0), (128, 3, 3.0), (256, 3, 4.0))
    measured = device("cpu", timings=(timings(decode_seconds_per_layer=rows),))
    costs = model(measured, batch_size=2)
    assert costs.decode_seconds(LAYER, "cpu") == pytest.approx(2.5)
    assert not costs.is_extrapolated(LAYER, "cpu")
    assert costs.is_measured(LAYER, "cpu")
    assert not costs.is_measured(PROFILE.head, "cpu")


def test_beyond_what_was_measured_a_curve_grows_like_the_roofline_and_says_so() -> None:
    rows = ((8, 1, 1.0), (16, 1, 1.0))
    measured = device("cpu", timings=(timings(decode_seconds_per_layer=rows),))
    costs = model(measured)
    growth = (LAYER.weight_bytes + 192 * 64) / (LAYER.weight_bytes + 16 * 64)
    assert costs.decode_seconds(LAYER, "cpu") == pytest.approx(growth)
    assert costs.is_extrapolated(LAYER, "cpu")


def test_a_measured_dip_is_levelled() -> None:
    assert estimate([(1, 2.0), (2, 1.0), (3, 4.0)], point=(2,), model=lambda _: 1.0).seconds == 2.0


def test_curves_of_this_layer_shape_win_over_those_of_any_and_other_shapes_and_dtypes_are_ignored() -> None:
    row = ((192, 1, 1.0),)
    of_any = timings(decode_seconds_per_layer=row)
    own = timings(LAYER.shapes_sha256, decode_seconds_per_layer=((192, 1, 2.0),))
    other = timings("f" * 64, decode_seconds_per_layer=((192, 1, 3.0),))
    wide = Timings(profile="*", dtype="fp32", decode_seconds_per_layer=((192, 1, 4.0),))
    chosen = {
        (of_any, own): 2.0,
        (other, of_any): 1.0,
        (wide, of_any): 1.0,
    }
    for rows, seconds in chosen.items():
        assert model(device("cpu", timings=rows)).decode_seconds(LAYER, "cpu") == seconds
    roofline = model().decode_seconds(LAYER, "cpu")
    assert model(device("cpu", timings=(other, wide))).decode_seconds(LAYER, "cpu") == roofline


def test_measured_ends_are_read_by_rows_and_by_sequences() -> None:
    ends = timings(embedding_seconds=((1, 1.0), (256, 2.0)), head_seconds=((1, 5.0), (3, 7.0)))
    costs = model(device("cpu", timings=(ends,)), batch_size=2)
    assert costs.prefill_seconds(PROFILE.embedding, "cpu") == (2.0,)
    assert costs.decode_seconds(PROFILE.head, "cpu") == pytest.approx(6.0)


def test_measured_prefill_is_read_by_tokens_past_and_batch() -> None:
    rows = ((64, 0, 1, 1.0), (64, 64, 1, 3.0), (128, 0, 1, 4.0))
    costs = model(device("cpu", timings=(timings(prefill_seconds_per_layer=rows),)), prefill_chunk_tokens=64)
    assert costs.prefill_seconds(LAYER, "cpu") == (1.0, 3.0)


ROWS = st.lists(
    st.tuples(st.integers(1, 500), st.integers(1, 8), st.floats(0, 10)),
    min_size=1,
    max_size=8,
    unique_by=lambda r: r[:2],
)


@given(rows=ROWS, context=st.integers(1, 600), batch=st.integers(1, 10), more=st.integers(0, 100))
def test_a_measured_time_never_falls_as_context_or_batch_grows(
    rows: list[tuple[int, int, float]], context: int, batch: int, more: int
) -> None:
    def at(*point: float) -> float:
        return estimate(rows, point=point, model=lambda p: 1.0 + p[0] + p[1]).seconds

    assert at(context + more, batch) >= at(context, batch) - 1e-9


# --- whole chains -------------------------------------------------------------------------------------------------

TWO = (StageRange("a", 0, 3, True, False), StageRange("b", 3, 4, False, True))


def two_devices(**changes: Any) -> Any:
    links = (link("a", "b", bandwidth=1e6, latency=1e-3), link("b", "a", bandwidth=1e6, latency=5e-3))
    return cluster(device("a"), device("b", memory_bandwidth_bytes_per_second=1e9), links=links, **changes)


def test_seconds_per_token_are_the_stages_the_hops_and_the_way_back() -> None:
    load = workload(batch_size=2)
    costs = CostModel(PROFILE, workload=load, cluster=two_devices())
    stages, prediction = predict(PROFILE, workload=load, cluster=two_devices(), stages=TWO)
    first = costs.decode_seconds(PROFILE.embedding, "a") + 3 * costs.decode_seconds(LAYER, "a")
    second = costs.decode_seconds(LAYER, "b") + costs.decode_seconds(PROFILE.head, "b")
    hop = 1e-3 + 2 * 32 * 2 / 1e6
    back = 5e-3 + 2 * 8 / 1e6
    assert [stage.decode_seconds for stage in stages] == [pytest.approx(first), pytest.approx(second)]
    assert [stage.hop_seconds for stage in stages] == [pytest.approx(hop), 0.0]
    assert prediction.return_hop_seconds == pytest.approx(back)
    assert prediction.seconds_per_token == pytest.approx(first + second + hop + back)
    assert prediction.tokens_per_second == pytest.approx(2 / prediction.seconds_per_token)
    assert prediction.pipelined_tokens_per_second == pytest.approx(prediction.tokens_per_second)


@pytest.mark.parametrize(("in_flight", "limit"), [(2, "cycle"), (50, "slowest")])
def test_requests_in_flight_divide_the_cycle_until_the_slowest_part_limits(in_flight: int, limit: str) -> None:
    load = workload(requests_in_flight=in_flight)
    stages, prediction = predict(PROFILE, workload=load, cluster=two_devices(), stages=TWO)
    parts = [s.decode_seconds for s in stages] + [s.hop_seconds for s in stages] + [prediction.return_hop_seconds]
    period = 1 / prediction.pipelined_tokens_per_second
    expected = prediction.seconds_per_token / in_flight if limit == "cycle" else max(parts)
    assert period == pytest.approx(max(expected, max(parts)))


def test_the_first_token_in_one_process_waits_for_everything_in_a_row() -> None:
    load = workload(prefill_chunk_tokens=64)
    costs = CostModel(PROFILE, workload=load, cluster=two_devices())
    stages, prediction = predict(PROFILE, workload=load, cluster=two_devices(), stages=TWO)
    hops = 2 * costs.prefill_hop_seconds("a", "b", 64)
    assert prediction.time_to_first_token_seconds == pytest.approx(sum(s.prefill_seconds for s in stages) + hops)


def test_the_first_token_of_processes_overlaps_chunks() -> None:
    load = workload(prefill_chunk_tokens=64)
    costs = CostModel(PROFILE, workload=load, cluster=two_devices(), execution="process_per_stage")
    _stages, prediction = predict(
        PROFILE, workload=load, cluster=two_devices(), stages=TWO, execution="process_per_stage"
    )
    a = costs.stage_prefill_seconds(TWO[0])
    b = costs.stage_prefill_seconds(TWO[1])
    hop = costs.prefill_hop_seconds("a", "b", 64)
    second_arrives = max(a[0] + a[1], a[0] + hop) + hop  # the link carries one chunk at a time
    second_starts = max(second_arrives, a[0] + hop + b[0])
    assert prediction.time_to_first_token_seconds == pytest.approx(second_starts + b[1])


def test_one_stage_has_no_hops_at_all() -> None:
    whole = (StageRange("a", 0, 4, True, True),)
    stages, prediction = predict(PROFILE, workload=workload(), cluster=two_devices(), stages=whole)
    assert prediction.return_hop_seconds == 0
    assert prediction.seconds_per_token == stages[0].decode_seconds


def test_the_memory_share_is_the_largest_of_the_stages() -> None:
    small = cluster(device("a", budget_bytes=1 << 20), device("b"))
    _stages, prediction = predict(PROFILE, workload=workload(), cluster=small, stages=TWO)
    alone = cluster(device("a"), device("b"))
    _stages, roomy = predict(PROFILE, workload=workload(), cluster=alone, stages=TWO)
    assert prediction.max_memory_share == pytest.approx(1024 * roomy.max_memory_share)


def test_a_chain_over_unconnected_devices_is_refused_with_the_pair() -> None:
    apart = cluster(
        device("a", host="x"),
        device("b", host="y"),
        device("c", host="z"),
        links=(link("x", "z", bandwidth=1e9, latency=0.0),),
    )
    with pytest.raises(InfeasibleError, match=r"from a \(host x\) to b \(host y\)"):
        predict(PROFILE, workload=workload(), cluster=apart, stages=TWO)


def test_rates_that_make_a_request_last_for_days_are_bad_input() -> None:
    slow = cluster(device("a"), device("b", memory_bandwidth_bytes_per_second=10.0))
    slowest = slow.model_copy(
        update={
            "devices": tuple(d.model_copy(update={"memory_bandwidth_bytes_per_second": 1e-6}) for d in slow.devices)
        }
    )
    with pytest.raises(InputError, match="check the rates"):
        predict(PROFILE, workload=workload(), cluster=slowest, stages=TWO)


def test_the_hop_of_the_published_cluster_is_reproduced() -> None:
    # 32,768 bytes (two sequences of 8192 in bf16) over 1e9 B/s and 1 ms: tests of the solver use the whole cluster
    between = cluster(
        device("a", host="x"), device("b", host="y"), links=(class_link("between_hosts", bandwidth=1e9, latency=1e-3),)
    )
    wide = tiny_profile(hidden_size=8192, num_attention_heads=64, head_dim=128)
    costs = CostModel(wide, workload=workload(batch_size=2), cluster=between)
    assert costs.decode_hop_seconds("a", "b") == pytest.approx(1.032768e-3, rel=1e-12)


@given(
    cut=st.integers(0, 4),
    factor=st.floats(1, 100),
    context=st.integers(256, 4096),
    execution=st.sampled_from(["one_process", "process_per_stage"]),
)
def test_more_bandwidth_and_a_shorter_context_never_make_a_chain_slower(
    cut: int, factor: float, context: int, execution: Any
) -> None:
    stages = (StageRange("a", 0, cut, True, False), StageRange("b", cut, 4, False, True))

    def seconds(rate: float, prompt: int) -> tuple[float, float]:
        pair = cluster(device("a", memory_bandwidth_bytes_per_second=rate), device("b"))
        load = workload(context_tokens=context, prompt_tokens=prompt, prefill_chunk_tokens=32)
        _stages, p = predict(PROFILE, workload=load, cluster=pair, stages=stages, execution=execution)
        return p.seconds_per_token, p.time_to_first_token_seconds

    slow, fast, short = seconds(1e8, 128), seconds(1e8 * factor, 128), seconds(1e8, 64)
    assert all(a >= b - 1e-15 for a, b in zip(slow, fast, strict=True))
    assert all(a >= b - 1e-15 for a, b in zip(slow, short, strict=True))
    assert not any(math.isnan(value) for value in (*slow, *fast))


# --- memory buses -------------------------------------------------------------------------------------------------


def two_processes(bandwidth: float | None, *, kind: str = "cpu", in_flight: int = 4) -> Prediction:
    """Two devices of one host that read 10 GB/s each, whose bus carries `bandwidth`."""
    host = Host(name="local", memory_bandwidth_bytes_per_second=bandwidth)
    both = cluster(device("cpu#0", kind=kind), device("cpu#1", kind=kind), hosts=(host,))
    stages = (StageRange("cpu#0", 0, 2, True, False), StageRange("cpu#1", 2, 4, False, True))
    asked = workload(requests_in_flight=in_flight)
    return predict(PROFILE, workload=asked, cluster=both, stages=stages, execution="process_per_stage")[1]


def test_stages_that_read_at_once_share_their_memory_bus() -> None:
    read = sum(bytes_read(unit, work=Work(1, 191, 1), profile=PROFILE) for unit in PROFILE.units)
    assert two_processes(1e7).pipelined_tokens_per_second == pytest.approx(1e7 / read)


def test_a_bus_as_wide_as_all_its_devices_changes_nothing() -> None:
    assert two_processes(2e10) == two_processes(None)


def test_one_token_at_a_time_is_not_slowed_by_a_shared_bus() -> None:
    assert two_processes(1e10, in_flight=1).seconds_per_token == two_processes(None, in_flight=1).seconds_per_token


def test_accelerators_read_through_buses_of_their_own() -> None:
    assert two_processes(1e7, kind="cuda") == two_processes(None, kind="cuda")
