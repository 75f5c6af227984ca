"""The planner's Python API on real profiles: exact fits, determinism, options, and agreement with the cost model."""

import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from planner.answers.check import check_against_model, recompute
from planner.answers.solve import objective_seconds
from planner.model.profile import build_profile
from planner.model.workloads import make_workload
from planner.problem.build import build_problem
from planner.problem.evaluate import evaluate, time_of
from planner.problem.problem import StageChoice
from planner.timing.costs import predict
from plans.checkpoint.folder import open_checkpoint
from plans.cluster import Cluster
from plans.errors import InfeasibleError, IntegrityError, UsageError
from plans.plan import Plan
from plans.profile import ModelProfile
from plans.stages import StageRange
from plans.workload import Workload
from tests.planner.cases import class_link, cluster, device, link, solve, tiny_profile, workload

THREE = cluster(
    device("a", budget_bytes=90_000),
    device("b", budget_bytes=120_000, memory_bandwidth_bytes_per_second=3e10),
    device("c", budget_bytes=80_000, memory_bandwidth_bytes_per_second=2e10),
    links=(link("a", "b", bandwidth=1e9, latency=1e-6), class_link("same_host", bandwidth=2e8, latency=1e-5)),
)
LOAD = workload(prompt_tokens=8, new_tokens=8, context_tokens=32, prefill_chunk_tokens=8)
ARGUMENTS = list(product(("uniform", "memory", "compute", "mixed"), ("latency", "request", "throughput")))


def _solve(profile: ModelProfile, parts: Cluster, load: Workload, **options: Any) -> Plan:
    return solve(profile, cluster=parts, workload=load, is_isolated=False, solvers=("highs",), **options)


@pytest.fixture(scope="module")
def profile() -> ModelProfile:
    return tiny_profile()


def _roomy() -> Cluster:
    return cluster(*(d.model_copy(update={"budget_bytes": 400_000}) for d in THREE.devices), links=THREE.links)


@pytest.mark.parametrize(("strategy", "objective"), ARGUMENTS)
@pytest.mark.parametrize("execution", ["one_process", "process_per_stage"])
def test_plan_agrees_with_itself(profile: ModelProfile, strategy: Any, objective: Any, execution: Any) -> None:
    plan = _solve(profile, _roomy(), LOAD, strategy=strategy, objective=objective, execution=execution)
    recompute(plan, where="plan")
    assert Plan.from_json(plan.to_json().encode(), where="plan") == plan
    assert plan.proof.status == "optimal"
    assert plan.proof.gap == 0
    assert plan.proof.certified_by is not None
    assert (plan.trade_off is not None) == (strategy == "mixed")
    if strategy in ("compute", "uniform"):
        assert plan.proof.objective == objective_seconds(plan)
    if strategy == "memory":
        assert plan.proof.objective == plan.prediction.max_memory_share


@pytest.mark.parametrize("objective", ["latency", "request", "throughput"])
@pytest.mark.parametrize("execution", ["one_process", "process_per_stage"])
def test_problem_and_cost_model_give_the_same_time(profile: ModelProfile, objective: Any, execution: Any) -> None:
    load = LOAD.model_copy(update={"prefill_chunk_tokens": 3, "requests_in_flight": 3})
    problem = build_problem(profile, workload=load, cluster=THREE, execution=execution)
    chain = (StageChoice(2, 0, 1), StageChoice(0, 1, 3), StageChoice(1, 3, 4))
    ranges = (
        StageRange("c", 0, 1, True, False),
        StageRange("a", 1, 3, False, False),
        StageRange("b", 3, 4, False, True),
    )
    _, predicted = predict(profile, workload=load, cluster=THREE, stages=ranges, execution=execution)
    ticks = time_of(problem, chain, objective=objective) / (3 if objective == "throughput" else 1)
    seconds = {
        "latency": predicted.seconds_per_token,
        "request": predicted.time_to_first_token_seconds + 7 * predicted.seconds_per_token,
        "throughput": 1 / predicted.pipelined_tokens_per_second,
    }[objective]
    assert ticks * problem.tick_seconds == pytest.approx(seconds, rel=1e-6)
    share = evaluate(problem, chain, objective=objective).share
    assert float(share) == pytest.approx(predicted.max_memory_share, rel=1e-12)


def test_same_input_gives_the_same_bytes(profile: ModelProfile) -> None:
    for strategy in ("compute", "memory", "mixed"):
        first, second = (_solve(profile, THREE, LOAD, strategy=strategy) for _ in range(2))
        assert first.to_json() == second.to_json()


def test_solver_process_gives_the_same_plan(profile: ModelProfile) -> None:
    here = _solve(profile, THREE, LOAD, strategy="mixed")
    apart = solve(profile, cluster=THREE, workload=LOAD, strategy="mixed", solvers=("highs",))
    assert here.to_json() == apart.to_json()


def test_exact_fit_is_a_plan_and_one_byte_less_is_not(profile: ModelProfile) -> None:
    roomy = cluster(device("only"))
    needed = _solve(profile, roomy, LOAD).stages[0].total_bytes
    exact = _solve(profile, cluster(device("only", budget_bytes=needed)), LOAD)
    assert exact.stages[0].total_bytes == exact.stages[0].budget_bytes
    assert exact.prediction.max_memory_share == 1.0
    with pytest.raises(InfeasibleError, match="shortage is 1 bytes") as caught:
        _solve(profile, cluster(device("only", budget_bytes=needed - 1)), LOAD)
    assert caught.value.exit_code == 4
    assert f"a budget of {needed} bytes" in caught.value.hint


@pytest.mark.parametrize("strategy", ["compute", "memory", "mixed", "uniform"])
def test_exact_fit_over_two_devices_is_found_by_every_strategy(profile: ModelProfile, strategy: Any) -> None:
    cut = _solve(profile, cluster(device("a"), device("b")), LOAD, strategy="custom", layers="2,2")
    budgets = [stage.total_bytes for stage in cut.stages]
    tight = cluster(*(device(name, budget_bytes=size) for name, size in zip("ab", budgets, strict=True)))
    assert [s.num_layers for s in _solve(profile, tight, LOAD, strategy=strategy).ranges] == [2, 2]
    short = cluster(device("a", budget_bytes=budgets[0]), device("b", budget_bytes=budgets[1] - 1))
    with pytest.raises(InfeasibleError):
        _solve(profile, short, LOAD, strategy=strategy)


def test_a_device_that_does_not_help_is_left_out(profile: ModelProfile) -> None:
    slow_link = (class_link("same_host", bandwidth=1e6, latency=1e-2),)
    plan = _solve(profile, cluster(device("a"), device("b"), links=slow_link), LOAD)
    assert len(plan.stages) == 1
    both = _solve(profile, cluster(device("a"), device("b"), links=slow_link), LOAD, use_all=True)
    assert len(both.stages) == 2
    assert both.prediction.seconds_per_token > plan.prediction.seconds_per_token


def test_kept_order_is_kept(profile: ModelProfile) -> None:
    free = _solve(profile, THREE, LOAD, strategy="memory")
    kept = _solve(profile, THREE, LOAD, strategy="memory", keep_order=True)
    order = [d.name for d in THREE.devices]
    assert [order.index(s.device) for s in kept.stages] == sorted(order.index(s.device) for s in kept.stages)
    assert kept.proof.objective >= free.proof.objective
    assert kept.proof.certified_by == "dynamic programming over a fixed order"


def test_hand_written_cut_is_costed_and_not_changed(profile: ModelProfile) -> None:
    plan = _solve(profile, _roomy(), LOAD, strategy="custom", layers="0-1@c,1-4@a")
    assert [(s.device, s.start_layer, s.end_layer) for s in plan.stages] == [("c", 0, 1), ("a", 1, 4)]
    assert (plan.proof.status, plan.proof.solver, plan.proof.certified_by) == ("given", "none", None)
    best = _solve(profile, _roomy(), LOAD, strategy="compute")
    assert best.prediction.seconds_per_token <= plan.prediction.seconds_per_token


def test_open_places_of_a_cut_are_filled_in(profile: ModelProfile) -> None:
    plan = _solve(profile, _roomy(), LOAD, strategy="custom", layers="1,*,2")
    assert [(s.device, s.num_layers) for s in plan.ranges] == [("a", 1), ("b", 1), ("c", 2)]
    pinned = _solve(profile, _roomy(), LOAD, pins=["0-2@a", "head@c"], bans=["b"])
    assert [s.device for s in pinned.stages] == ["a", "c"]
    assert pinned.stages[0].end_layer >= 2
    ends = _solve(profile, _roomy(), LOAD, strategy="custom", layers="0-0@c,4-4@b")
    assert [(s.device, s.num_layers) for s in ends.ranges] == [("c", 0), ("a", 4), ("b", 0)]


def test_uniform_that_does_not_fit_names_the_nearest_split(profile: ModelProfile) -> None:
    cut = _solve(profile, cluster(device("a"), device("b")), LOAD, strategy="custom", layers="3,1")
    budgets = [stage.total_bytes for stage in cut.stages]
    tight = cluster(*(device(name, budget_bytes=size) for name, size in zip("ab", budgets, strict=True)))
    with pytest.raises(InfeasibleError, match="--layers 3,1"):
        _solve(profile, tight, LOAD, strategy="uniform")


def test_tied_table_counts_once_where_both_ends_share_a_device() -> None:
    tied = tiny_profile(tie_word_embeddings=True)
    one = _solve(tied, cluster(device("a")), LOAD)
    two = _solve(tied, cluster(device("a"), device("b")), LOAD, use_all=True)
    assert one.stages[0].weight_bytes == tied.total_weight_bytes
    assert sum(s.weight_bytes for s in two.stages) == tied.total_weight_bytes + tied.embedding.weight_bytes


def test_layers_that_differ_are_planned_exactly(profile: ModelProfile) -> None:
    window = profile.layers[1].model_copy(update={"kv_window_tokens": 4})
    units = (*profile.units[:2], window, *profile.units[3:])
    unlike = profile.model_copy(update={"units": units})
    tight = cluster(*(d.model_copy(update={"budget_bytes": 60_000}) for d in THREE.devices), links=THREE.links)
    plan = _solve(unlike, tight, LOAD.model_copy(update={"context_tokens": 200}), strategy="memory")
    assert plan.proof.status == "optimal"
    assert plan.proof.certified_by == "Held-Karp over device groups and positions"


def test_highs_and_cbc_give_the_same_objective(profile: ModelProfile) -> None:
    for strategy in ("compute", "memory", "mixed"):
        plans = [
            solve(profile, cluster=THREE, workload=LOAD, strategy=strategy, solvers=(name,), is_isolated=False)
            for name in ("highs", "cbc")
        ]
        assert plans[0].proof.objective == plans[1].proof.objective
        assert [plan.proof.solver for plan in plans] == ["HiGHS", "CBC"]


def test_slow_devices_and_long_requests_stay_exact(profile: ModelProfile) -> None:
    slow = cluster(*(d.model_copy(update={"memory_bandwidth_bytes_per_second": 1e3}) for d in THREE.devices))
    load = LOAD.model_copy(update={"new_tokens": 1000, "context_tokens": 1100})
    big = cluster(*(d.model_copy(update={"budget_bytes": 1 << 24}) for d in slow.devices))
    problem = build_problem(profile, workload=load, cluster=big)
    assert problem.tick_seconds > 1e-12
    plan = _solve(profile, big, load, objective="request")
    assert plan.proof.status == "optimal"


def test_options_that_contradict_each_other_are_refused(profile: ModelProfile) -> None:
    for options in (
        {"weight": float("nan")},
        {"weight": 1.5},
        {"strategy": "compute", "layers": "2,2"},
        {"pins": ["0-1@a", "0-1@b"]},
        {"pins": ["0-1@a"], "bans": ["a"]},
    ):
        with pytest.raises(UsageError):
            _solve(profile, THREE, LOAD, **options)


def test_disconnected_devices_are_explained(profile: ModelProfile) -> None:
    apart = Cluster(
        devices=tuple(device(n, host=f"h{n}", budget_bytes=41_000) for n in "abc"),
        hosts=({"name": "ha"}, {"name": "hb"}, {"name": "hc"}),  # type: ignore[arg-type]
        links=(link("ha", "hb", bandwidth=1e9, latency=1e-6),),
    )
    with pytest.raises(InfeasibleError, match="no chain of links connects enough of them; there is no way from a to c"):
        _solve(profile, apart, LOAD)


def test_edited_times_are_noticed(profile: ModelProfile) -> None:
    plan = _solve(profile, THREE, LOAD)
    stages = (plan.stages[0].model_copy(update={"decode_seconds": 1.0}), *plan.stages[1:])
    with pytest.raises(IntegrityError, match="/stages/0/decode_seconds"):
        recompute(plan.model_copy(update={"stages": stages}), where="plan.json")


def test_plan_is_compared_with_the_checkpoint(shipped: Path, profile: ModelProfile) -> None:
    real = build_profile(open_checkpoint(shipped))
    plan = _solve(real, cluster(device("a", budget_bytes=1 << 30)), make_workload(real))
    assert check_against_model(plan, shipped) == []
    assert "only a configuration" in check_against_model(plan, shipped / "config.json")[0]
    with pytest.raises(IntegrityError):
        check_against_model(plan.model_copy(update={"profile": profile}), shipped)


def test_solving_never_imports_torch() -> None:
    code = (
        "import sys; from tests.planner.answers.test_solve import THREE, LOAD, _solve; "
        "from tests.planner.cases import tiny_profile; _solve(tiny_profile(), THREE, LOAD); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_problem_may_be_changed_without_touching_the_old_one(profile: ModelProfile) -> None:
    problem = build_problem(profile, workload=LOAD, cluster=THREE)
    assert problem.has_identical_layers
    other = replace(problem, keep_order=True)
    assert not problem.keep_order
    assert other.prefix_bytes == problem.prefix_bytes
