"""Plans with packed weights: what they record, that old plans stay as they were, and which width is taken."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.answers.check import check_against_model, recompute
from planner.answers.explain import explain_infeasible
from planner.answers.solve import solve as solve_question
from planner.answers.widest import widest_that_fits
from planner.api import solve_model
from planner.model.profile import build_profile
from planner.model.widths import narrower_than, packed
from planner.problem.question import Question
from planner.program.effort import Effort
from planner.timing.costs import CostModel
from plans.check import check_plan
from plans.cluster import Cluster, Timings
from plans.errors import InfeasibleError, InputError, IntegrityError
from plans.packed.choice import WeightChoice
from plans.plan import Plan
from plans.reading.sizes import format_bytes
from tests.planner.cases import EVEN, bare, cluster, device, in_width, workload

LOAD = workload(prompt_tokens=8, new_tokens=8, context_tokens=32, prefill_chunk_tokens=8)
QUICK = Effort(("highs",), is_isolated=False)
PLAIN = build_profile(bare(**EVEN))
ROOMY = cluster(device("a"), device("b", memory_bandwidth_bytes_per_second=3e10))


def question(parts: Cluster = ROOMY, **changes: Any) -> Question:
    return Question(PLAIN, parts, LOAD, narrower=narrower_than(bare(**EVEN), PLAIN, None), **changes)


def of_budget(size: int) -> Cluster:
    return cluster(device("a", budget_bytes=size))


def test_a_plan_records_its_weights_and_agrees_with_itself() -> None:
    found = in_width("int4")
    plan = solve_question(question().packed(found), QUICK)
    assert plan.weights == found.choice
    assert sum(stage.weight_bytes for stage in plan.stages) == found.profile.total_weight_bytes
    recompute(plan, where="plan")
    again = Plan.from_json(plan.to_json().encode(), where="plan")
    assert again == plan
    check_plan(again, where="plan")
    assert Question.of(again).weights == found.choice


def test_fewer_bits_are_read_faster_by_the_roofline_of_their_bytes() -> None:
    times = [
        CostModel(profile, workload=LOAD, cluster=ROOMY).decode_seconds(profile.layers[0], "a")
        for profile in (PLAIN, in_width("int8").profile, in_width("int4").profile)
    ]
    cache = LOAD.decode_context_tokens * PLAIN.layers[0].kv_bytes_per_token
    sizes = [PLAIN.layers[0].weight_bytes, *(in_width(w).profile.layers[0].weight_bytes for w in ("int8", "int4"))]
    assert times == [(size + cache) / 1e10 for size in sizes]


def test_curves_of_one_width_count_for_units_of_that_width_alone() -> None:
    shape = PLAIN.layers[0].shapes_sha256
    curves = [
        Timings(profile=shape, dtype="bf16", weights=width, decode_seconds_per_layer=((1, 1, seconds),),
                head_seconds=((1, 10 * seconds),))
        for width, seconds in ((None, 0.003), ("int8", 0.002))
    ]  # fmt: skip
    parts = cluster(device("a", timings=tuple(curves)))
    load = workload(prompt_tokens=1, new_tokens=0, context_tokens=1, prefill_chunk_tokens=1)

    def seconds(profile: Any, unit: str) -> float:
        return CostModel(profile, workload=load, cluster=parts).decode_seconds(getattr(profile, unit), "a")

    narrow, four = in_width("int8").profile, in_width("int4").profile
    layers = [
        CostModel(p, workload=load, cluster=parts).decode_seconds(p.layers[0], "a") for p in (PLAIN, narrow, four)
    ]
    assert layers[:2] == [0.003, 0.002]
    assert layers[2] < 1e-5  # nobody timed it: the roofline
    assert [seconds(PLAIN, "head"), seconds(narrow, "head"), seconds(four, "head")] == [0.03, 0.02, 0.02]


def test_a_plan_without_packed_weights_is_written_as_before() -> None:
    written = json.loads(solve_question(question(), QUICK).to_json())
    assert "weights" not in written
    assert all("weights" not in unit for unit in written["profile"]["units"])


def test_a_plan_whose_weights_are_not_its_profiles_is_refused() -> None:
    text = solve_question(question().packed(in_width("int4")), QUICK).to_json()
    other = json.loads(text)
    other["weights"]["layer_bits"][2] = 8
    other["weights"]["kind"] = "mixed"
    with pytest.raises(InputError, match="weights give layer 2 8 bits, the profile sizes it as int4"):
        Plan.from_json(json.dumps(other).encode(), where="plan")


def test_sizes_that_the_export_would_not_have_are_found_against_the_model(shipped: Any) -> None:
    from planner.model.widths import uniform
    from plans.checkpoint.folder import open_checkpoint

    checkpoint = open_checkpoint(shipped)
    plain = build_profile(checkpoint)
    found = uniform(checkpoint, plain, "int4")
    load = workload(context_tokens=256)
    plan = solve_question(Question(found.profile, ROOMY, load, weights=found.choice), QUICK)
    assert check_against_model(plan, shipped) == []
    wrong = plain.model_copy(update={"units": (*plain.units[:-1], found.profile.head)})
    with pytest.raises(IntegrityError, match="weight_bytes for layer 0, the model gives"):
        check_against_model(plan.model_copy(update={"profile": wrong}), shipped)


def test_the_widest_width_that_fits_is_taken_and_the_narrowest_where_none_does() -> None:
    whole = question()
    needed = [
        solve_question(asked, QUICK).stages[0].total_bytes
        for asked in (question(of_budget(1 << 20)), *(question(of_budget(1 << 20)).packed(n) for n in whole.narrower))
    ]
    assert needed == sorted(needed, reverse=True)
    for size, kind in zip((*needed, needed[-1] - 1), (None, "int8", "int4", "int4"), strict=True):
        chosen = widest_that_fits(question(of_budget(size)))
        assert (chosen.weights.kind if chosen.weights else None) == kind
        chosen = widest_that_fits(question(of_budget(size), strategy="uniform"))
        assert (chosen.weights.kind if chosen.weights else None) == kind


def test_advice_names_the_widths_that_fit_with_what_their_best_plan_takes() -> None:
    whole = question()
    four = solve_question(replace(whole, cluster=of_budget(1 << 20)).packed(whole.narrower[1]), QUICK)
    tight = question(of_budget(four.stages[0].total_bytes))
    said = explain_infeasible(tight).line()
    size, time = format_bytes(four.profile.total_weight_bytes), four.prediction.seconds_per_token * 1e3
    assert f"--weights int4 ({size} of weights; its best plan takes {time:.4g} ms per token)" in said
    assert "--weights int8" not in said
    with pytest.raises(InfeasibleError, match="--weights int4"):
        solve_question(tight, QUICK)


def test_python_asks_for_a_width_as_the_command_does(shipped: Path) -> None:
    plan = solve_model(shipped, devices=["cpu=1GiB"], weights="int8", ctx_size=128)
    assert plan.weights is not None
    assert (plan.weights.kind, plan.weights.head_bits) == ("int8", 8)


def test_layers_of_two_widths_are_placed_and_proved_like_any_others() -> None:
    choice = WeightChoice(kind="mixed", layer_bits=(4, 8, 8, 4), head_bits=8)
    found = packed(bare(**EVEN), PLAIN, choice)
    plan = solve_question(question().packed(found), QUICK)
    assert (plan.proof.status, plan.proof.gap) == ("optimal", 0)
    assert plan.proof.certified_by is not None
    recompute(plan, where="plan")
