"""The largest context and the most requests in flight: found, and one more proved impossible."""

from typing import Any

import pytest

from planner.answers.capacity import Capacity, chain_of, measure_capacity
from planner.program.session import SolverSession
from planner.show.plan import capacity_line
from plans.errors import InfeasibleError
from plans.plan import Plan
from plans.profile import ModelProfile
from tests.planner.cases import cluster, device, solve, tiny_profile, workload

LOAD = workload(prompt_tokens=16, new_tokens=16, context_tokens=64, prefill_chunk_tokens=16)
PARTS = cluster(device("a", budget_bytes=110_000), device("b", budget_bytes=90_000), device("c", budget_bytes=70_000))


@pytest.fixture(scope="module")
def profile() -> ModelProfile:
    return tiny_profile()


def _solve(profile: ModelProfile, load: Any = LOAD, **options: Any) -> Plan:
    return solve(profile, cluster=PARTS, workload=load, is_isolated=False, **options)


def _capacity(plan: Plan, key: Any) -> Capacity:
    with SolverSession(is_isolated=False) as session:
        return measure_capacity(plan, key, session=session)


@pytest.mark.parametrize("key", ["context_tokens", "requests_in_flight"])
@pytest.mark.parametrize("options", [{}, {"keep_order": True}, {"bans": ["b"]}, {"use_all": True}])
def test_largest_value_has_a_plan_and_one_more_has_none(profile: ModelProfile, key: Any, options: Any) -> None:
    plan = _solve(profile, **options)
    found = _capacity(plan, key)
    assert found.planned <= found.this_cut <= found.any_cut
    at_most = _solve(profile, LOAD.model_copy(update={key: found.any_cut}), **options)
    assert at_most.proof.status == "optimal"
    with pytest.raises(InfeasibleError):
        _solve(profile, LOAD.model_copy(update={key: found.any_cut + 1}), **options)
    assert found.proved_by[0] == "HiGHS"
    assert len(found.proved_by) == 2


def test_this_cut_is_what_the_plan_itself_can_grow_to(profile: ModelProfile) -> None:
    plan = _solve(profile)
    found = _capacity(plan, "context_tokens")
    cut = ",".join(f"{s.start_layer}-{s.end_layer}@{s.device}" for s in plan.stages)
    grown = LOAD.model_copy(update={"context_tokens": found.this_cut})
    assert _solve(profile, grown, strategy="custom", layers=cut).proof.status == "given"
    with pytest.raises(InfeasibleError):
        _solve(profile, LOAD.model_copy(update={"context_tokens": found.this_cut + 1}), strategy="custom", layers=cut)


def test_a_cut_given_by_hand_stays_that_cut(profile: ModelProfile) -> None:
    plan = _solve(profile, strategy="custom", layers="2,2")
    found = _capacity(plan, "context_tokens")
    assert found.this_cut == found.any_cut
    assert found.proved_by == ("the exact check of the cut",)


def test_layers_that_keep_a_window_never_fill_up(profile: ModelProfile) -> None:
    windowed = tuple(layer.model_copy(update={"kv_window_tokens": 32}) for layer in profile.layers)
    sliding = profile.model_copy(update={"units": (profile.units[0], *windowed, profile.units[-1])})
    plan = _solve(sliding)
    found = _capacity(plan, "context_tokens")
    assert (found.this_cut, found.any_cut, found.proved_by) == (2**31, 2**31, ())
    assert "as many as can be asked for" in capacity_line(found)


def test_chain_of_a_plan_are_its_stages(profile: ModelProfile) -> None:
    plan = _solve(profile, strategy="custom", layers="0-1@c,1-4@a")
    assert [(s.device, s.start, s.end) for s in chain_of(plan)] == [(2, 0, 1), (0, 1, 4)]


def test_out_of_time_is_said(profile: ModelProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.answers import capacity

    plan = _solve(profile)
    monkeypatch.setattr(capacity, "has_plan", lambda _problem: None)
    with SolverSession(time_limit=1e-9, is_isolated=False) as session:
        monkeypatch.setattr("planner.answers.settle.certify", lambda *_a, **_k: None)
        monkeypatch.setattr("planner.answers.settle.quick_plan", lambda *_a, **_k: None)
        with pytest.raises(InfeasibleError, match="time was up"):
            measure_capacity(plan, "context_tokens", session=session)


def test_line_names_who_proved_it(profile: ModelProfile) -> None:
    found = Capacity("requests_in_flight", 1, 3, 5, ("HiGHS", "Held-Karp over device groups"))
    assert capacity_line(found) == (
        "largest requests in flight: 3 with this cut, 5 with any cut "
        "(6 proved infeasible by HiGHS and Held-Karp over device groups)"
    )
