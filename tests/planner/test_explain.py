"""An explained no: the shortage to the byte, and advice that really helps."""

import random
import re
from dataclasses import replace
from typing import Any

import pytest

from planner.certificate import certify
from planner.explain import with_new_device
from planner.feasible import has_plan
from planner.goal import Goal
from planner.solve import solve
from plans.cluster import Cluster
from plans.errors import InfeasibleError
from plans.profile import ModelProfile
from plans.workload import Workload
from tests.planner.cases import cluster, device, tiny_profile, workload
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
    assert " on b, which offers" in error.what


def test_too_many_devices_for_an_even_split(profile: ModelProfile) -> None:
    seven = cluster(*(device(f"d{i}") for i in range(7)))
    assert "4 layers cannot be spread evenly over 7 devices" in _no_plan(profile, seven, LOAD, strategy="uniform").what
    five = cluster(*(device(f"d{i}") for i in range(5)))
    plan = solve(profile, cluster=five, workload=LOAD, is_isolated=False, strategy="uniform")
    assert [stage.num_layers for stage in plan.stages] == [1, 1, 1, 1, 0]


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
