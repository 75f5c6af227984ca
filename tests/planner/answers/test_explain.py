"""An explained no: the shortage to the byte, and advice that really helps."""

import random
import re
from dataclasses import replace
from typing import Any

import pytest

from planner.answers.explain import with_new_device
from planner.devices.budgets import parse_margins, with_budgets
from planner.problem.goal import Goal
from planner.proof.certificate import certify
from planner.proof.feasible import has_plan
from plans.cluster import Cluster, Host
from plans.errors import InfeasibleError
from plans.profile import ModelProfile
from plans.workload import Workload
from tests.planner.cases import cluster, device, link, solve, tiny_profile, workload
from tests.planner.random_problems import random_problem

LOAD = workload(prompt_tokens=64, new_tokens=64, context_tokens=512, prefill_chunk_tokens=64, batch_size=4)


def _no_plan(profile: ModelProfile, parts: Cluster, load: Workload, **options: Any) -> InfeasibleError:
    with pytest.raises(InfeasibleError) as caught:
        solve(profile, cluster=parts, workload=load, is_isolated=False, **options)
    return caught.value


def _fits(profile: ModelProfile, parts: Cluster, load: Workload) -> bool:
    try:
        solve(profile, cluster=parts, workload=load, is_isolated=False)
    except InfeasibleError:
        return False
    return True


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, text
    return int(match.group(1))


@pytest.fixture(scope="module")
def profile() -> ModelProfile:
    return tiny_profile()


TIGHT = cluster(device("a", budget_bytes=330_000), device("b", budget_bytes=200_000))


def test_shortage_is_exact_to_the_byte(profile: ModelProfile) -> None:
    error = _no_plan(profile, TIGHT, LOAD)
    short, name = _number(r"shortage is (\d+) bytes", error.what), re.search(r"on (\w), which", error.what)
    assert name is not None
    for extra, is_enough in ((short, True), (short - 1, False)):
        devices = tuple(
            d.model_copy(update={"budget_bytes": (d.budget_bytes or 0) + extra * (d.name == name.group(1))})
            for d in TIGHT.devices
        )
        assert _fits(profile, Cluster(devices=devices), LOAD) == is_enough


@pytest.mark.parametrize(
    ("option", "key"),
    [("--ctx-size", "context_tokens"), ("--batch-size", "batch_size"), ("--prefill-chunk", "prefill_chunk_tokens")],
)
def test_advice_on_the_workload_is_the_largest_that_fits(profile: ModelProfile, option: str, key: str) -> None:
    error = _no_plan(profile, TIGHT, LOAD)
    if option not in error.hint:
        smallest = 128 if key == "context_tokens" else 1
        assert not _fits(profile, TIGHT, LOAD.model_copy(update={key: smallest}))
        return
    best = _number(rf"{option} (\d+)", error.hint)
    assert _fits(profile, TIGHT, LOAD.model_copy(update={key: best}))
    assert not _fits(profile, TIGHT, LOAD.model_copy(update={key: best + 1}))


def test_requests_in_flight_are_advised(profile: ModelProfile) -> None:
    error = _no_plan(profile, TIGHT, LOAD.model_copy(update={"batch_size": 1, "requests_in_flight": 16}))
    best = _number(r"--requests-in-flight (\d+)", error.hint)
    assert 1 <= best < 16


def test_one_more_device_of_just_enough_bytes_is_advised(profile: ModelProfile) -> None:
    error = _no_plan(profile, TIGHT, LOAD)
    needed = _number(r"one more device with (\d+) bytes", error.hint)
    for size, is_enough in ((needed, True), (needed - 1, False)):
        grown = Cluster(devices=(*TIGHT.devices, device("new", budget_bytes=size)))
        assert _fits(profile, grown, LOAD) == is_enough


def test_smaller_dtypes_are_advised_where_the_runtime_has_them() -> None:
    wide = tiny_profile(dtype="float32")
    load = LOAD.model_copy(update={"dtype": "fp32", "kv_cache_dtype": "fp32", "batch_size": 1})
    error = _no_plan(wide, cluster(device("a", budget_bytes=300_000)), load)
    assert "--dtype bf16 (now fp32)" in error.hint
    half = tiny_profile()
    fits = LOAD.model_copy(update={"batch_size": 1})
    assert _fits(half, cluster(device("a", budget_bytes=300_000)), fits)


def test_unit_that_fits_nowhere_is_named() -> None:
    wide = tiny_profile(vocab_size=4096)
    error = _no_plan(wide, cluster(device("a", budget_bytes=200_000), device("b", budget_bytes=200_000)), LOAD)
    assert "the embedding alone needs" in error.what


def test_demands_that_cannot_be_met_are_told_apart_from_memory(profile: ModelProfile) -> None:
    roomy = cluster(device("a"), device("b"))
    error = _no_plan(profile, roomy, LOAD, bans=["a", "0-1@b"])
    assert "no plan exists under these demands" in error.what
    assert _no_plan(profile, roomy, LOAD, bans=["a", "b"]).what == "no device offers any memory"


def test_hand_written_cut_that_does_not_fit_names_the_device(profile: ModelProfile) -> None:
    error = _no_plan(profile, TIGHT, LOAD, strategy="custom", layers="1,3")
    short = _number(r"this cut does not fit: b lacks (\d+) bytes .* for its 3 layers", error.what)
    for size, is_enough in ((200_000 + short, True), (200_000 + short - 1, False)):
        parts = cluster(TIGHT.devices[0], device("b", budget_bytes=size))
        options: dict[str, Any] = {"strategy": "custom", "layers": "1,3"}
        if is_enough:
            assert solve(profile, cluster=parts, workload=LOAD, is_isolated=False, **options).boundaries == (1, 3)
        else:
            assert "b lacks 1 bytes" in _no_plan(profile, parts, LOAD, **options).what


def test_an_even_split_that_does_not_fit_names_every_device_that_is_short(profile: ModelProfile) -> None:
    small = cluster(device("a", budget_bytes=50_000), device("b", budget_bytes=60_000))
    error = _no_plan(profile, small, LOAD, strategy="uniform")
    assert re.search(r"a lacks \d+ bytes .* for its 2 layers .*, b lacks \d+ bytes .* for its 2 layers", error.what)


def test_a_margin_is_advised_where_budgets_were_made_with_one(profile: ModelProfile) -> None:
    load = LOAD.model_copy(update={"batch_size": 1})
    needed = solve(profile, cluster=cluster(device("a")), workload=load, is_isolated=False).stages[0].total_bytes
    bare = cluster(device("a", kind="cuda", memory_bytes=needed * 100 // 88, budget_bytes=None))
    error = _no_plan(profile, with_budgets(bare), load)
    best = _number(r"--margin (\d+)% on the accelerators \(now up to 15%\)", error.hint)
    assert _fits(profile, with_budgets(bare, parse_margins([f"{best}%"])), load)
    assert not _fits(profile, with_budgets(bare, parse_margins([f"{best + 1}%"])), load)
    assert "--margin" not in _no_plan(profile, TIGHT, LOAD).hint


def test_no_budget_is_advised_that_the_device_or_its_host_does_not_have(profile: ModelProfile) -> None:
    parts = [device(name, memory_bytes=400_000, budget_bytes=150_000) for name in "ab"]
    host = Host(name="local", memory_bytes=400_000)
    error = _no_plan(profile, cluster(*parts, hosts=(host,)), LOAD)
    assert re.search(r"of memory in host local, which has 390\.6 KiB, for a budget of \d+ bytes .* on [ab]", error.hint)
    smaller = [part.model_copy(update={"memory_bytes": 200_000}) for part in parts]
    assert re.search(r"a device with \d+ bytes .* free in place of [ab], which has 195\.3 KiB",
                     _no_plan(profile, cluster(*smaller), LOAD).hint)  # fmt: skip


def test_a_missing_link_is_advised_where_it_is_enough(profile: ModelProfile) -> None:
    load = LOAD.model_copy(update={"batch_size": 1})
    whole = solve(profile, cluster=cluster(device("a")), workload=load, is_isolated=False).stages[0].total_bytes
    parts = [device(name, host=f"h{name}", budget_bytes=whole * 2 // 3) for name in "abc"]
    hosts = tuple(Host(name=f"h{name}") for name in "abcd")
    apart = cluster(*parts, hosts=hosts, links=(link("ha", "hd", bandwidth=1e9, latency=0.0),))
    error = _no_plan(profile, apart, load)
    joined = re.search(r"a link between (h\w) and (h\w)", error.hint)
    assert joined is not None, error.hint
    more = (*apart.links, link(*joined.groups(), bandwidth=1e9, latency=0.0))
    assert _fits(profile, apart.model_copy(update={"links": more}), load)
    # With three stages the ids must come back from the third host to the first: no single link is enough.
    devices = tuple(part.model_copy(update={"budget_bytes": 140_000}) for part in parts)
    small = apart.model_copy(update={"devices": devices})
    assert (
        "links between all hosts (class between_hosts)" in _no_plan(tiny_profile(num_hidden_layers=6), small, load).hint
    )


def test_too_many_devices_for_an_even_split(profile: ModelProfile) -> None:
    seven = cluster(*(device(f"d{i}") for i in range(7)))
    assert "4 layers cannot be spread evenly over 7 devices" in _no_plan(profile, seven, LOAD, strategy="uniform").what
    five = cluster(*(device(f"d{i}") for i in range(5)))
    plan = solve(profile, cluster=five, workload=LOAD, is_isolated=False, strategy="uniform")
    assert [stage.num_layers for stage in plan.ranges] == [1, 1, 1, 1, 0]


def test_has_plan_is_what_the_certificate_says() -> None:
    rng = random.Random(31)
    for _ in range(250):
        problem = random_problem(rng, max_devices=4, has_rules=rng.random() < 0.3)
        certificate = certify(problem, Goal("time", "latency"))
        assert certificate is not None
        assert has_plan(problem) == (certificate.value is not None)


def test_new_device_can_only_help() -> None:
    rng = random.Random(32)
    for _ in range(60):
        problem = replace(random_problem(rng, max_devices=3, is_plain=True))
        if has_plan(problem):
            assert has_plan(with_new_device(problem, 1))
        assert has_plan(with_new_device(problem, 1 << 40))
