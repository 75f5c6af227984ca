"""The simulator agrees with the formulas, and its timelines are physically possible."""

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.simulate.one_plan import Event, simulate, simulate_plan
from planner.simulate.trace import trace
from planner.timing.costs import CostModel, predict_chain
from plans.errors import InfeasibleError
from plans.stages import StageRange
from tests.planner.cases import cluster, device, link, make_plan, tiny_profile, workload

PROFILE = tiny_profile(num_hidden_layers=6)
NAMES = "abcd"


@st.composite
def chains(draw: st.DrawFn) -> tuple[CostModel, list[StageRange]]:
    """Up to four devices of very unlike speed, links from free to slow, and any cut (empty middles excluded)."""
    count = draw(st.integers(1, 4))
    rates = st.sampled_from([1e6, 1e7, 1e8, 1e9])
    devices = [device(name, memory_bandwidth_bytes_per_second=draw(rates)) for name in NAMES[:count]]
    links = tuple(
        link(a, b, bandwidth=draw(rates), latency=draw(st.sampled_from([0.0, 1e-4, 1e-2])))
        for a in NAMES[:count]
        for b in NAMES[:count]
        if a != b
    )
    inner = draw(st.lists(st.integers(0, 6), min_size=count - 1, max_size=count - 1, unique=count > 2).map(sorted))
    bounds = [0, *inner, 6]
    load = workload(
        requests_in_flight=draw(st.sampled_from([1, 2, 3, 7, 40])),
        batch_size=draw(st.integers(1, 3)),
        prefill_chunk_tokens=draw(st.sampled_from([16, 50, 128])),
    )
    execution: Any = draw(st.sampled_from(["one_process", "process_per_stage"]))
    model = CostModel(PROFILE, workload=load, cluster=cluster(*devices, links=links), execution=execution)
    stages = [
        StageRange(name, start, end, index == 0, index == count - 1)
        for index, (name, (start, end)) in enumerate(zip(NAMES, pairwise(bounds), strict=False))
    ]
    return model, stages


@given(chains())
@settings(max_examples=200, deadline=None)
def test_simulation_and_formulas_agree(case: tuple[CostModel, list[StageRange]]) -> None:
    model, stages = case
    seen = simulate(model, stages=stages)
    _times, said = predict_chain(model, stages=stages)
    assert seen.time_to_first_token_seconds == pytest.approx(said.time_to_first_token_seconds, rel=1e-9)
    assert seen.seconds_per_token == pytest.approx(said.seconds_per_token, rel=1e-9)
    assert seen.tokens_per_second == pytest.approx(said.tokens_per_second, rel=1e-9)
    assert seen.pipelined_tokens_per_second == pytest.approx(said.pipelined_tokens_per_second, rel=1e-6)


@given(chains())
@settings(max_examples=50, deadline=None)
def test_nothing_is_in_two_places_and_no_resource_does_two_things(case: tuple[CostModel, list[StageRange]]) -> None:
    model, stages = case
    seen = simulate(model, stages=stages)
    by_resource, by_request = defaultdict(list), defaultdict(list)
    for event in seen.decode_events:
        by_resource[event.resource].append(event)
        by_request[event.request].append(event)
    for events in (*by_resource.values(), *by_request.values()):
        assert_disjoint(events)
    for name in {stage.device for stage in stages}:
        assert_disjoint([event for event in seen.prefill_events if event.resource == name])
    assert all(0 <= share <= 1 + 1e-9 for share in seen.busy_shares)


def assert_disjoint(events: list[Event]) -> None:
    for before, after in pairwise(sorted(events, key=lambda event: (event.start_seconds, event.end_seconds))):
        assert after.start_seconds >= before.end_seconds - 1e-12


def test_in_one_process_a_prefill_never_overlaps() -> None:
    plan = make_plan(workload=workload(prefill_chunk_tokens=16))
    assert_disjoint(list(simulate_plan(plan).prefill_events))
    apart = make_plan(workload=workload(prefill_chunk_tokens=16), execution="process_per_stage")
    faster = simulate_plan(apart).prefill_events
    assert any(b.start_seconds < a.end_seconds for a, b in pairwise(sorted(faster, key=lambda e: e.start_seconds)))


def test_a_plan_is_simulated_to_its_own_prediction() -> None:
    plan = make_plan(workload=workload(requests_in_flight=2))
    seen = simulate_plan(plan)
    assert seen.seconds_per_token == pytest.approx(plan.prediction.seconds_per_token)
    assert seen.pipelined_tokens_per_second == pytest.approx(plan.prediction.pipelined_tokens_per_second)


def test_two_equal_stages_with_two_requests_are_both_busy_all_the_time() -> None:
    pair = cluster(
        device("a", memory_bandwidth_bytes_per_second=1e6),
        device("b", memory_bandwidth_bytes_per_second=1e6),
        links=(link("a", "b", bandwidth=1e12, latency=0.0),),
    )
    untied = CostModel(PROFILE, workload=workload(requests_in_flight=2), cluster=pair)
    layers_only = [StageRange("a", 0, 3, False, False), StageRange("b", 3, 6, False, False)]
    assert simulate(untied, stages=layers_only).busy_shares == pytest.approx((1.0, 1.0), rel=1e-4)


def test_more_requests_never_slow_the_pipeline_down() -> None:
    periods = [
        simulate_plan(make_plan(workload=workload(requests_in_flight=count))).step_period_seconds
        for count in (1, 2, 3, 8, 65536)
    ]
    assert all(before >= after * (1 - 1e-9) for before, after in pairwise(periods))


def test_unconnected_devices_are_explained() -> None:
    apart = cluster(
        device("a", host="x"),
        device("b", host="y"),
        device("c", host="z"),
        links=(link("x", "z", bandwidth=1e9, latency=0.0),),
    )
    model = CostModel(PROFILE, workload=workload(), cluster=apart)
    with pytest.raises(InfeasibleError, match="no link leads from a"):
        simulate(model, stages=[StageRange("a", 0, 3, True, False), StageRange("b", 3, 6, False, True)])


def test_a_trace_names_every_track_and_keeps_every_event_in_order() -> None:
    simulation = simulate_plan(make_plan(workload=workload(requests_in_flight=2, prefill_chunk_tokens=32)))
    document = json.loads(json.dumps(trace(simulation)))
    spans = [event for event in document["traceEvents"] if event["ph"] == "X"]
    tracks = {(e["pid"], e["tid"]) for e in document["traceEvents"] if e["name"] == "thread_name"}
    assert len(spans) == len(simulation.prefill_events) + len(simulation.decode_events)
    assert {(event["pid"], event["tid"]) for event in spans} == tracks
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
