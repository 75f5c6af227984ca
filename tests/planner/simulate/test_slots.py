"""Requests that share steps: a trace by hand, one slot like one request after the other, and what must always hold."""

import json
from collections import deque
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.simulate.serving import most_in_flight, simulate_requests
from planner.simulate.slots import Running, next_members, simulate_slots
from planner.timing.roofline import Work, bytes_read
from plans.cluster import Device, Host, Timings
from plans.errors import InfeasibleError, UsageError
from plans.plan import Plan
from plans.workload import Request
from runtime.engine.sequence import Sequence
from runtime.engine.turns import Turns
from runtime.generate.limits import Limits
from runtime.generate.request import Request as EngineRequest
from runtime.generate.sampling import Sampling
from tests.conftest import RunCommand
from tests.planner.cases import cluster, device, link, make_plan, workload
from tests.planner.simulate.test_serving import RATES, alike, check_resources, largest_overlap, plans, records

FREE = (link("a", "b", bandwidth=1e15, latency=0.0),)


def steady_device(name: str) -> Device:
    """A layer takes 0.25 s for a chunk, 0.0625 s for a token, 0.125 s for the tokens of two sequences."""
    timings = Timings(
        profile="*",
        dtype="bf16",
        threads=1,
        decode_seconds_per_layer=((4, 1, 0.0625), (4, 2, 0.125), (64, 1, 0.0625), (64, 2, 0.125)),
        prefill_seconds_per_layer=((4, 0, 1, 0.25), (4, 4, 1, 0.25), (4, 8, 1, 0.25)),
        embedding_seconds=((1, 0.0),),
        head_seconds=((1, 0.0),),
    )
    return device(name, timings=(timings,))


def steady_plan(execution: Any = "one_process") -> Plan:
    """Two stages of two layers, chunks of four tokens."""
    load = workload(prompt_tokens=8, new_tokens=4, prefill_chunk_tokens=4)
    parts = cluster(steady_device("a"), steady_device("b"), links=FREE)
    return make_plan(workload=load, cluster=parts, execution=execution, cut=2)


def test_two_slots_and_three_requests_by_hand() -> None:
    # Chunks take 1 s, steps of one row 0.25 s and of two rows 0.5 s. The first prompt is read from 0 to 2; after a step
    # until 2.25 both chunks of the second, until 4.25; two steps of both. Now both are done, and the third comes in at
    # 5.25: its chunks until 7.25, and three steps of its own.
    coming = [Request(prompt_tokens=8, new_tokens=new) for new in (4, 3, 4)]
    seen = simulate_slots(steady_plan(), requests=coming, slots=2)
    assert seen.admitted == pytest.approx([0, 0, 5.25])
    assert seen.first_token == pytest.approx([2, 4.25, 7.25])
    assert seen.finished == pytest.approx([5.25, 5.25, 8])
    assert sorted(seen.token_gaps) == pytest.approx([0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 2.5])
    assert seen.busy_seconds["a"] == pytest.approx(4.0)


def test_two_processes_share_those_who_decode_by_hand() -> None:
    # A chunk takes 0.5 s a stage, a step of one row 0.125 s, and two steps are under way.
    coming = [Request(prompt_tokens=4, new_tokens=3) for _ in range(2)]
    seen = simulate_slots(steady_plan("process_per_stage"), requests=coming, slots=2)
    # a: first prompt 0 to 0.5, second 0.5 to 1; b: 0.5 to 1 and 1 to 1.5. At 1 the first one's token is back.
    assert seen.first_token == pytest.approx([1, 1.5])
    # The first decodes on a until 1.125, waits for b until 1.5, and has its token at 1.625; the second follows.
    assert seen.finished == pytest.approx([1.875, 2.0])
    assert seen.token_gaps == pytest.approx([0.625, 0.25, 0.25, 0.25])


@given(plans(), records())
@settings(max_examples=100, deadline=None)
def test_one_slot_serves_one_request_after_the_other(plan: Plan, coming: list[Request]) -> None:
    alone = plan.model_copy(update={"workload": plan.workload.model_copy(update={"batch_size": 1})})
    if plan.execution == "process_per_stage":  # several chunks under way are limited here, and not there
        coming = [r.model_copy(update={"prompt_tokens": min(r.prompt_tokens, 7)}) for r in coming]
    expected = simulate_requests(alone, requests=coming, in_flight=1)
    seen = simulate_slots(alone, requests=coming, slots=1)
    assert seen.finished == pytest.approx(expected.finished, rel=1e-9, abs=1e-9)
    assert seen.first_token == pytest.approx(expected.first_token, rel=1e-9, abs=1e-9)
    assert seen.token_gaps == pytest.approx(expected.token_gaps, rel=1e-9, abs=1e-9)


@given(plans(), records(), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_everybody_is_served_in_order_and_nothing_is_in_two_places(
    plan: Plan, coming: list[Request], slots: int
) -> None:
    seen = simulate_slots(plan, requests=coming, slots=slots, most_events=10_000)
    assert (seen.arrived <= seen.admitted).all()
    assert (seen.admitted <= seen.first_token).all()
    assert (seen.first_token <= seen.finished).all()
    assert (np.diff(seen.first_token) >= 0).all()
    assert len(seen.token_gaps) == sum(request.new_tokens - 1 for request in coming)
    assert largest_overlap(seen) <= slots
    check_resources(seen)


@st.composite
def moments(draw: st.DrawFn) -> list[tuple[Running, Sequence]]:
    """Requests that have slots, in any state: as the simulator has them, and as the engine does."""
    found = []
    for number in range(draw(st.integers(0, 6))):
        num_chunks, is_ready, turn = draw(st.integers(0, 2)), draw(st.booleans()), draw(st.integers(-1, 9))
        size = draw(st.sampled_from([4, 128, 200, 300]))
        chunks = deque((size, size * place) for place in range(num_chunks))
        real = in_engine(Request(prompt_tokens=2 * size, new_tokens=4), chunk_tokens=size)
        real.position, real.turn = (2 - num_chunks) * size, turn
        if not chunks and is_ready:
            real.token_ids.append(0)
        found.append((Running(number, 8, chunks, 4, is_ready=not chunks and is_ready, turn=turn), real))
    return found


@given(moments(), st.lists(st.sampled_from([1, 56, 57, 128, 400]), max_size=3), st.integers(1, 4))
@settings(max_examples=500, deadline=None)
def test_the_next_step_has_those_whom_the_engine_takes(
    everybody: list[tuple[Running, Sequence]], read: list[int], depth: int
) -> None:
    turns = Turns(depth=depth, reads_first=False)
    for tokens in read:
        turns.next([in_engine(Request(prompt_tokens=tokens, new_tokens=1), chunk_tokens=tokens)])
    real = {mine.number: theirs for mine, theirs in everybody}
    members = next_members([mine for mine, _theirs in everybody], read=read, depth=depth)
    assert [real[mine.number] for mine in members] == turns.next(real.values())


@given(plans(), records(), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_the_engine_would_have_sent_every_step_of_a_run(plan: Plan, coming: list[Request], slots: int) -> None:
    is_chain = plan.execution == "process_per_stage"
    turns = Turns(depth=len(plan.stages) if is_chain else 1, reads_first=False)
    real = [in_engine(request, chunk_tokens=plan.workload.prefill_chunk_tokens) for request in coming]

    def compared(running: list[Running], *, read: list[int], depth: int) -> list[Running]:
        for mine in running:
            if mine.is_ready and not real[mine.number].is_ready:
                real[mine.number].token_ids.append(0)
        members = next_members(running, read=read, depth=depth)
        chosen = turns.next([real[mine.number] for mine in running])
        assert [real[mine.number] for mine in members] == chosen
        for sequence in chosen:
            sequence.next_part(rope_switch=None)
        return members

    with patch("planner.simulate.slots.next_members", compared):
        simulate_slots(plan, requests=coming, slots=slots)
    assert [sequence.position for sequence in real] == [r.prompt_tokens + r.new_tokens - 1 for r in coming]


def in_engine(request: Request, *, chunk_tokens: int) -> Sequence:
    """Return what the engine makes of a request."""
    asked = EngineRequest(
        prompt_ids=[0] * request.prompt_tokens,
        sampling=Sampling(),
        limits=Limits(context_tokens=request.prompt_tokens + request.new_tokens, prefill_chunk_tokens=chunk_tokens),
    )
    return Sequence(asked, room=request.new_tokens, on_event=print, reuse_key=None, decode=None)


# --- memory buses -------------------------------------------------------------------------------------------------


def on_one_bus(plan: Plan, bandwidth: float | None) -> Plan:
    """The same stages on a host whose CPUs read so many bytes per second together."""
    hosts = tuple(
        Host(name=name, memory_bandwidth_bytes_per_second=bandwidth)
        for name in dict.fromkeys(d.host for d in plan.cluster.devices)
    )
    return plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"hosts": hosts})})


def step_bytes(plan: Plan, context: int) -> list[float]:
    """What a decode step of one row reads at every stage."""
    work = Work(1, context - 1, 1)
    units = [stage.units(plan.profile) for stage in plan.ranges]
    return [sum(bytes_read(unit, work=work, profile=plan.profile) for unit in own) for own in units]


@given(plans(), records(), st.integers(1, 5), st.sampled_from([1e5, 1e6, 1e7, 1e8]))
@settings(max_examples=100, deadline=None)
def test_a_bus_finishes_nothing_earlier(plan: Plan, coming: list[Request], slots: int, bandwidth: float) -> None:
    """A slower step may spare the next one a wait, so that single requests may gain; the last one never does."""
    free = simulate_slots(on_one_bus(plan, None), requests=coming, slots=slots)
    shared = simulate_slots(on_one_bus(plan, bandwidth), requests=coming, slots=slots)
    assert shared.finished.max() >= free.finished.max() - 1e-9


@given(plans(), records(), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_a_bus_as_wide_as_one_needs_changes_nothing(plan: Plan, coming: list[Request], slots: int) -> None:
    free, shared = (
        simulate_slots(on_one_bus(plan, bandwidth), requests=coming, slots=slots) for bandwidth in (None, 1e15)
    )
    assert shared.finished == pytest.approx(free.finished)
    assert shared.token_gaps == pytest.approx(free.token_gaps)


def test_two_stages_that_always_read_get_what_the_bus_carries() -> None:
    # Two requests are under way, one at either stage, and each stage takes 0.125 s for a row of its own.
    coming = [Request(prompt_tokens=4, new_tokens=60) for _ in range(2)]
    plan = steady_plan("process_per_stage")
    load = plan.workload.model_copy(update={"prompt_tokens": 4, "new_tokens": 60})
    plan = plan.model_copy(update={"workload": load})
    together = sum(step_bytes(plan, load.decode_context_tokens))
    for bus_period in (0.1, 0.2, 0.5):
        seen = simulate_slots(on_one_bus(plan, together / bus_period), requests=coming, slots=2)
        # A token of one request follows its last one after a step of the other.
        assert seen.token_gaps[-50:-2] == pytest.approx([2 * max(0.125, bus_period)] * 48, rel=1e-9)


@given(st.integers(0, 4), RATES, RATES, st.sampled_from([3e5, 1e6, 3e6, 1e7, 1e8]))
@settings(max_examples=60, deadline=None)
def test_slots_on_a_bus_reach_the_step_period_of_the_plan(cut: int, a: float, b: float, bandwidth: float) -> None:
    devices = (device("a", memory_bandwidth_bytes_per_second=a), device("b", memory_bandwidth_bytes_per_second=b))
    host = Host(name="local", memory_bandwidth_bytes_per_second=bandwidth)
    load = workload(prompt_tokens=1, new_tokens=300, requests_in_flight=2, prefill_chunk_tokens=1)
    parts = cluster(*devices, links=FREE, hosts=(host,))
    plan = make_plan(cluster=parts, workload=load, execution="process_per_stage", cut=cut)
    seen = simulate_slots(plan, requests=alike(plan, 2), slots=2)
    settled = seen.token_gaps[-200:]
    assert settled.mean() / 2 == pytest.approx(1 / plan.prediction.pipelined_tokens_per_second, rel=0.02)


def test_batches_are_told_what_the_bus_would_carry(run_command: RunCommand, tmp_path: Path) -> None:
    plan = steady_plan("process_per_stage")
    path = tmp_path / "plan.json"
    host = Host(name="local", memory_bandwidth_bytes_per_second=1e4)
    load = plan.workload.model_copy(update={"requests_in_flight": 2})
    path.write_text(
        make_plan(workload=load, cluster=plan.cluster.model_copy(update={"hosts": (host,)}), cut=2,
                  execution="process_per_stage").to_json()
    )  # fmt: skip
    done = run_command("llamaplan", "simulate", path, "--requests", "8")
    assert done.code == 0, done.err
    assert "--slots counts it" in done.err
    assert "--slots counts it" not in run_command("llamaplan", "simulate", path, "--requests", "8", "--slots", "2").err


def test_more_slots_than_the_devices_have_caches_for_are_refused() -> None:
    parts = cluster(device("a", budget_bytes=200_000), device("b", budget_bytes=1 << 30))
    plan = make_plan(cluster=parts, workload=workload(prompt_tokens=8, prefill_chunk_tokens=8, new_tokens=8))
    most, _name = most_in_flight(plan)
    simulate_slots(plan, requests=alike(plan, 2), slots=most)
    with pytest.raises(InfeasibleError, match=f"a holds the caches of {most} requests"):
        simulate_slots(plan, requests=alike(plan, 2), slots=most + 1)
    with pytest.raises(UsageError, match="request 1 has 500"):
        simulate_slots(plan, requests=[Request(prompt_tokens=500, new_tokens=13)], slots=1)


def test_the_command_takes_slots_or_places(run_command: RunCommand, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(steady_plan().to_json())
    done = run_command("llamaplan", "simulate", path, "--requests", "3", "--slots", "2", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["time_to_first_token_seconds"]["p50"] == pytest.approx(4.25)
    assert run_command("llamaplan", "simulate", path, "--slots", "2", "--in-flight", "2").code == 2
