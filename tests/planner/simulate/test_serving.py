"""The simulator of requests: exact where the answer is known, and never more than there is."""

import json
from collections import defaultdict
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.simulate.numbers import numbers_of, spread
from planner.simulate.one_plan import Event, simulate_plan
from planner.simulate.serving import Process, Serving, make_requests, most_in_flight, simulate_requests
from planner.simulate.tandem import Tandem
from plans.cluster import Host
from plans.errors import InfeasibleError, UsageError
from plans.plan import Plan
from plans.workload import Request
from tests.conftest import RunCommand
from tests.planner.cases import cluster, device, link, make_plan, workload

RATES = st.sampled_from([1e6, 1e7, 1e8, 1e9])


@st.composite
def plans(draw: st.DrawFn, *, most_new_tokens: int = 12, least_new_tokens: int = 1) -> Plan:
    """Two devices on one host or on two, of very unlike speed, with links from free to slow."""
    hosts = draw(st.sampled_from([("x", "x"), ("x", "y")]))
    devices = [
        device(name, host=host, memory_bandwidth_bytes_per_second=draw(RATES))
        for name, host in zip("ab", hosts, strict=True)
    ]
    links = tuple(
        link(one, other, bandwidth=draw(RATES), latency=draw(st.sampled_from([0.0, 1e-4, 1e-2])))
        for one, other in ("ab", "ba")
    )
    load = workload(
        prompt_tokens=draw(st.integers(1, 40)),
        new_tokens=draw(st.integers(least_new_tokens, most_new_tokens)),
        requests_in_flight=draw(st.sampled_from([1, 2, 3, 5])),
        batch_size=draw(st.integers(1, 3)),
        prefill_chunk_tokens=draw(st.sampled_from([7, 16, 40])),
    )
    execution: Any = draw(st.sampled_from(["one_process", "process_per_stage"]))
    cut = draw(st.integers(0, 4))
    return make_plan(workload=load, cluster=cluster(*devices, links=links), execution=execution, cut=cut)


@st.composite
def records(draw: st.DrawFn) -> list[Request]:
    """Up to ten requests of any length, bunched or spread out."""
    gaps = draw(st.lists(st.sampled_from([0.0, 1e-4, 1e-2, 1.0]), min_size=1, max_size=10))
    return [
        Request(arrival_seconds=float(at), prompt_tokens=draw(st.integers(1, 40)), new_tokens=draw(st.integers(1, 9)))
        for at in np.cumsum(gaps)
    ]


def alike(plan: Plan, count: int, *, rate: float | None = None, process: Process = "uniform", **changes: Any) -> Any:
    work = plan.workload
    lengths = {"prompt_tokens": work.prompt_tokens, "new_tokens": work.new_tokens, "seed": 0} | changes
    return make_requests(count, rate=rate, process=process, **lengths)


# --- exact ---------------------------------------------------------------------------------------------------------


@given(plans())
@settings(max_examples=150, deadline=None)
def test_one_request_alone_takes_what_the_plan_predicts(plan: Plan) -> None:
    seen = simulate_requests(plan, requests=alike(plan, 1))
    assert seen.first_token[0] == pytest.approx(plan.prediction.time_to_first_token_seconds, rel=1e-9, abs=1e-10)
    per_token = [plan.prediction.seconds_per_token] * (plan.workload.new_tokens - 1)
    assert seen.token_gaps == pytest.approx(per_token, rel=1e-9, abs=1e-10)


@given(plans(least_new_tokens=150, most_new_tokens=200))
@settings(max_examples=100, deadline=None)
def test_many_requests_reach_the_step_period_of_the_plan_exactly(plan: Plan) -> None:
    in_flight = plan.workload.requests_in_flight
    seen = simulate_requests(plan, requests=alike(plan, in_flight))
    limits = [plan.prediction.seconds_per_token / in_flight, plan.prediction.return_hop_seconds]
    limits += [s.decode_seconds for s in plan.stages] + [s.hop_seconds for s in plan.stages]
    period = max(limits)
    # Where the next slowest is almost as slow, requests drift into their rhythm by the difference alone, for hours.
    assume(all(limit == period or limit < 0.97 * period for limit in limits))
    # A token of a request follows its last one after every request had its turn.
    settled = seen.token_gaps[len(seen.token_gaps) * 3 // 5 :][:in_flight]
    assert settled == pytest.approx([in_flight * period] * in_flight, rel=1e-9)


def test_steps_alone_decode_as_the_simulator_that_lets_every_step_happen() -> None:
    plan = make_plan(workload=workload(prompt_tokens=1, new_tokens=60, requests_in_flight=3, prefill_chunk_tokens=1))
    seen = simulate_requests(plan, requests=alike(plan, 3))
    batch, gaps = plan.workload.batch_size, seen.token_gaps[-3:]
    assert 3 * batch / gaps.mean() == pytest.approx(simulate_plan(plan).pipelined_tokens_per_second)


def test_chunks_of_a_prompt_overlap_in_processes_and_follow_each_other_in_one() -> None:
    load = workload(prompt_tokens=128, prefill_chunk_tokens=16, new_tokens=1)
    parts = cluster(device("a"), device("b"), links=(link("a", "b", bandwidth=1e9, latency=1e-6),))
    one, apart = (
        make_plan(workload=load, cluster=parts, cut=2, execution=how) for how in ("one_process", "process_per_stage")
    )
    first, second = (simulate_requests(plan, requests=alike(plan, 1)).first_token[0] for plan in (one, apart))
    assert second < first


def test_a_place_is_free_again_when_the_last_token_is_back() -> None:
    plan = make_plan(workload=workload(prompt_tokens=8, new_tokens=4))
    seen = simulate_requests(plan, requests=alike(plan, 5), in_flight=1)
    assert seen.admitted[1:] == pytest.approx(seen.finished[:-1])
    alone = plan.prediction.time_to_first_token_seconds + 3 * plan.prediction.seconds_per_token
    assert seen.finished == pytest.approx(np.arange(1, 6) * (alone + plan.prediction.return_hop_seconds))


def test_a_link_that_the_chain_crosses_twice_carries_one_message_at_a_time() -> None:
    # x -> y -> x -> y: both hops from x to y take the wire of 1e4 bytes per second.
    hosts = (Host(name="x"), Host(name="y"))
    devices = [device(name, host=host) for name, host in zip("abcd", "xyxy", strict=True)]
    slow = (link("x", "y", bandwidth=1e4, latency=0.0), link("y", "x", bandwidth=1e9, latency=0.0))
    plan = chain_plan(cluster(*devices, links=slow, hosts=hosts), new_tokens=100)
    hop = plan.stages[0].hop_seconds
    assert max(s.decode_seconds for s in plan.stages) < hop / 10
    seen = simulate_requests(plan, requests=alike(plan, 4))
    assert seen.token_gaps[-4:] == pytest.approx([4 * 2 * hop] * 4, rel=1e-6)
    assert numbers_of(seen).busy_shares["x -> y"] == pytest.approx(1.0, abs=0.02)


def chain_plan(parts: Any, *, new_tokens: int) -> Plan:
    """One layer on each of four devices, four requests in flight."""
    from planner.timing.costs import predict
    from plans.plan import Stage
    from plans.stages import StageRange
    from tests.planner.cases import stage_bytes

    load = workload(prompt_tokens=1, prefill_chunk_tokens=1, new_tokens=new_tokens, requests_in_flight=4)
    base = make_plan(workload=load)
    ranges = [StageRange(d.name, i, i + 1, i == 0, i == 3) for i, d in enumerate(parts.devices)]
    times, prediction = predict(base.profile, workload=load, cluster=parts, stages=ranges)
    stages = tuple(
        Stage(
            **asdict(part), budget_bytes=1 << 30, **asdict(seconds),
            **asdict(stage_bytes(base.profile, load, parts, part, "one_process")),
        )
        for part, seconds in zip(ranges, times, strict=True)
    )  # fmt: skip
    return base.model_copy(update={"cluster": parts, "stages": stages, "prediction": prediction})


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.data())
@settings(max_examples=100, deadline=None)
def test_the_running_maximum_is_the_recursion_stop_by_stop(links: list[int], data: st.DataObject) -> None:
    tandem, free, now = Tandem([f"stop {i}" for i in range(len(links))]), [0] * len(links), 0
    for _ in range(6):
        ticks = data.draw(st.lists(st.integers(0, 9), min_size=len(links), max_size=len(links)))
        now += data.draw(st.integers(0, 9))
        leave = now
        for index, busy in enumerate(ticks):
            free[index] = leave = max(leave, free[index]) + busy
        assert tandem.enter(tandem.work(ticks), part=0, now=now) == leave
        assert tandem.left(0).tolist() == free


# --- what must always hold -----------------------------------------------------------------------------------------


@given(plans(), records())
@settings(max_examples=100, deadline=None)
def test_everything_that_arrives_is_served_in_order_and_nothing_happens_too_early(
    plan: Plan, coming: list[Request]
) -> None:
    seen = simulate_requests(plan, requests=coming)
    assert (seen.arrived <= seen.admitted).all()
    assert (seen.admitted <= seen.first_token).all()
    assert (seen.first_token <= seen.finished).all()
    assert (np.diff(seen.admitted) >= 0).all()
    assert len(seen.token_gaps) == sum(request.new_tokens - 1 for request in coming)
    assert seen.num_tokens == plan.workload.batch_size * sum(request.new_tokens for request in coming)
    assert largest_overlap(seen) <= plan.workload.requests_in_flight


def largest_overlap(seen: Serving) -> int:
    """The most requests that were in flight at once; who leaves makes room before the next one comes."""
    moments = sorted([(t, 1) for t in seen.admitted] + [(t, -1) for t in seen.finished])
    return int(np.cumsum([step for _t, step in moments]).max())


@given(plans(), records())
@settings(max_examples=60, deadline=None)
def test_no_device_or_link_does_two_things_at_once(plan: Plan, coming: list[Request]) -> None:
    check_resources(simulate_requests(plan, requests=coming, most_events=10_000))


def check_resources(seen: Serving) -> None:
    """Require that every device and link did one thing at a time, and was busy for as long as all of them took."""
    by_resource: dict[str, list[Event]] = defaultdict(list)
    for event in seen.events:
        by_resource[event.resource].append(event)
    for name, events in by_resource.items():
        ordered = sorted(events, key=lambda event: (event.start_seconds, event.end_seconds))
        assert all(b.start_seconds >= a.end_seconds - 1e-9 for a, b in pairwise(ordered))
        busy = sum(event.end_seconds - event.start_seconds for event in events)
        assert busy == pytest.approx(seen.busy_seconds[name], rel=1e-9, abs=1e-9)


@given(plans(), records(), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_little_s_law_holds(plan: Plan, coming: list[Request], in_flight: int) -> None:
    """Requests in flight on average = requests per second x time in flight."""
    seen = simulate_requests(plan, requests=coming, in_flight=in_flight)
    numbers = numbers_of(seen)
    in_chain = numbers.latency.mean - numbers.waiting.mean
    assert numbers.mean_in_flight == pytest.approx(numbers.requests_per_second * in_chain, rel=1e-9)
    assert numbers.mean_in_flight <= in_flight + 1e-9


def test_a_chain_with_room_to_spare_does_not_fall_behind_and_an_overloaded_one_does() -> None:
    plan = make_plan(workload=workload(prompt_tokens=8, new_tokens=8))
    alone = simulate_requests(plan, requests=alike(plan, 1)).finished[0]
    calm, crowded = (
        numbers_of(simulate_requests(plan, requests=alike(plan, 2000, rate=load / alone, process="poisson")))
        for load in (0.5, 1.5)
    )
    assert not calm.falls_behind
    assert crowded.falls_behind
    # One server with constant service and utilisation 0.5 lets a Poisson customer wait half a service (M/D/1).
    assert calm.waiting.mean == pytest.approx(0.5 * alone, rel=0.15)
    assert crowded.requests_per_second == pytest.approx(1 / alone, rel=0.01)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    plan = make_plan(workload=workload(prompt_tokens=8, new_tokens=8, requests_in_flight=2))
    runs = [
        simulate_requests(plan, requests=alike(plan, 50, rate=500.0, process="poisson", seed=seed))
        for seed in (1, 1, 2)
    ]
    assert runs[0].finished.tolist() == runs[1].finished.tolist() != runs[2].finished.tolist()


def test_percentiles_are_values_that_occurred() -> None:
    found = spread(np.arange(1.0, 101.0))
    assert (found.p50, found.p90, found.p99, found.max, found.mean) == (50, 90, 99, 100, 50.5)


# --- what does not fit ---------------------------------------------------------------------------------------------


def test_no_more_requests_in_flight_than_the_devices_have_room_for() -> None:
    parts = cluster(device("a", budget_bytes=200_000), device("b", budget_bytes=1 << 30))
    plan = make_plan(cluster=parts, workload=workload(prompt_tokens=8, prefill_chunk_tokens=8, new_tokens=8))
    most, name = most_in_flight(plan)
    assert name == "a"
    simulate_requests(plan, requests=alike(plan, 2), in_flight=most)
    with pytest.raises(InfeasibleError, match=f"a holds the caches of {most} requests in this cut, not of {most + 1}"):
        simulate_requests(plan, requests=alike(plan, 2), in_flight=most + 1)


def test_a_request_longer_than_the_context_is_named() -> None:
    plan = make_plan()
    coming = [Request(prompt_tokens=8, new_tokens=8), Request(prompt_tokens=500, new_tokens=13)]
    with pytest.raises(UsageError, match=r"request 2 has 500 \+ 13 tokens, the plan's context is 512"):
        simulate_requests(plan, requests=coming)


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(make_plan(workload=workload(prompt_tokens=32, new_tokens=16, requests_in_flight=3)).to_json())
    return path


def test_the_command_simulates_and_its_json_says_the_same(run_command: RunCommand, plan_file: Path) -> None:
    arguments = ("simulate", plan_file, "--requests", "40", "--rate", "100", "--seed", "7")
    shown, data = run_command("llamaplan", *arguments), run_command("llamaplan", *arguments, "--json")
    assert (shown.code, data.code) == (0, 0), shown.err + data.err
    document = json.loads(data.out)
    assert f"{document['tokens_per_second']:.4g} tokens/s" in shown.out
    assert document["num_requests"] == 40
    assert set(document["busy_shares"]) == {"a", "b", "a -> b", "b -> a"}
    assert document == json.loads(run_command("llamaplan", *arguments, "--json").out)


def test_the_command_takes_a_recorded_file_and_writes_a_trace(
    run_command: RunCommand, plan_file: Path, tmp_path: Path
) -> None:
    record, trace = tmp_path / "record.jsonl", tmp_path / "trace.json"
    lines = [{"arrival_seconds": at, "prompt_tokens": 20, "new_tokens": 5} for at in (0.5, 0.25, 0.0)]
    record.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    done = run_command("llamaplan", "simulate", plan_file, "--arrivals", record, "--trace", trace, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["num_requests"] == 3
    spans = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert {span["cat"] for span in spans} == {"prefill", "decode", "hop", "return"}
    assert len(spans) == 3 * (1 + 4) * 4
