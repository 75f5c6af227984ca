"""The example plans are sound, and the planner still makes them."""

from pathlib import Path

import pytest

from planner.answers.solve import solve
from planner.devices.clusters import load_cluster
from planner.model.profile import build_profile
from planner.problem.question import Question
from plans import Plan, check_plan, read_plan
from plans.checkpoint.folder import open_checkpoint

EXAMPLES = Path(__file__).parents[2] / "plans" / "examples"
PLANS = sorted(path.name for path in EXAMPLES.glob("*.plan.json"))


@pytest.mark.parametrize("name", PLANS)
def test_an_example_plan_passes_the_exact_check_and_reads_back_byte_for_byte(name: str) -> None:
    plan = read_plan(EXAMPLES / name)
    check_plan(plan, where=name)
    assert plan.to_json() == (EXAMPLES / name).read_text(encoding="utf-8")
    assert plan.proof.status == "optimal"
    assert plan.proof.certified_by


@pytest.mark.parametrize("name", PLANS)
def test_solving_again_from_what_a_plan_carries_gives_the_same_plan(name: str) -> None:
    plan = read_plan(EXAMPLES / name)
    assert without_versions(solve(Question.of(plan))) == without_versions(plan)


def test_the_demo_plan_is_for_the_shipped_checkpoint_on_the_demo_cluster(shipped: Path) -> None:
    plan = read_plan(EXAMPLES / "demo.plan.json")
    assert plan.cluster == load_cluster(EXAMPLES / "demo.json")
    profile = build_profile(open_checkpoint(shipped))
    assert [u.shapes_sha256 for u in plan.profile.units] == [u.shapes_sha256 for u in profile.units]
    assert len(plan.stages) == 3


def without_versions(plan: Plan) -> Plan:
    return plan.model_copy(update={"proof": plan.proof.model_copy(update={"solver_version": ""})})
