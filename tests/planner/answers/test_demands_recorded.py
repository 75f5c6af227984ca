"""A plan records what the user fixed by hand, and whoever asks on asks that question."""

import json
from pathlib import Path
from typing import Any

import pytest

from planner.answers.check import recompute
from planner.problem.question import Question
from planner.program.effort import Effort
from planner.report.page import render_report
from planner.rivals.alternatives import alternatives_to
from plans.errors import ExitCode, IntegrityError
from plans.plan import Demands, Plan
from tests.conftest import SHIPPED, RunCommand
from tests.planner.cases import asked, cluster, device, solve, tiny_profile, workload

FAST: dict[str, Any] = {"solvers": ("highs",), "is_isolated": False}
PARTS = cluster(*(device(name) for name in ("a", "b", "c")))
DEMANDS = [
    {"pins": ("embedding@b",)},
    {"bans": ("a",)},
    {"keep_order": True, "use_all": True},
    {"layers": "1,3", "strategy": "custom"},
    {"layers": "1,*", "strategy": "custom"},
]


def solved(**options: Any) -> Plan:
    return solve(tiny_profile(), cluster=PARTS, workload=workload(), **FAST, **options)


@pytest.mark.parametrize("options", DEMANDS, ids=str)
def test_a_plan_records_its_demands_and_answers_the_same_question_again(options: dict[str, Any]) -> None:
    plan = solved(**options)
    assert plan.demands == Demands(**{key: value for key, value in options.items() if key != "strategy"})
    again = Plan.from_json(plan.to_json().encode(), where="plan")
    assert again == plan
    assert Question.of(again) == asked(tiny_profile(), cluster=PARTS, workload=workload(), **options)[0]
    recompute(again, where="plan")


def test_a_plan_without_demands_has_no_such_key() -> None:
    plan = solved()
    assert plan.demands is None
    assert "demands" not in json.loads(plan.to_json())
    assert "demands" not in plan.model_dump(mode="json", by_alias=True)


def test_a_plan_that_breaks_its_demands_is_not_sound() -> None:
    plan = solved()
    banned = plan.model_copy(update={"demands": Demands(bans=(plan.stages[0].device,))})
    with pytest.raises(IntegrityError, match="breaks its own demands"):
        recompute(banned, where="plan")


def test_a_report_answers_under_the_demands_of_its_plan() -> None:
    plan = solved(bans=("a",), pins=("head@c",))
    found = alternatives_to(plan, Effort(is_isolated=False))
    own = [row for row in found.comparison.rows if row.kind == "strategy" and row.fits]
    assert len(own) >= 3
    for stages in [row.stages for row in own] + [option.stages for option in found.by_share + found.by_devices]:
        assert stages[-1].device == "c"
        assert "a" not in {stage.device for stage in stages}
    assert "Asked for: head on c, not a." in render_report(plan, alternatives=found)


def test_a_report_holds_other_cuts_against_a_cut_by_hand() -> None:
    plan = solved(layers="1,3", strategy="custom")
    found = alternatives_to(plan, Effort(is_isolated=False))
    compute = next(row for row in found.comparison.rows if row.name == "compute")
    assert compute.fits
    assert [stage.range.num_layers for stage in plan.stages] != [s.end_layer - s.start_layer for s in compute.stages]


def test_solve_writes_demands_and_show_and_check_know_them(run_command: RunCommand, tmp_path: Path) -> None:
    path, devices = tmp_path / "plan.json", ("--device", "cpu=700MiB", "--device", "cpu=700MiB")
    done = run_command(
        "llamaplan", "solve", SHIPPED, *devices, "--pin", "head@cpu#1", "--max-ctx", "-o", path, "--json"
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["demands"]["pins"] == ["head@cpu#1"]
    assert document["capacities"][0]["any_cut"] >= document["capacities"][0]["this_cut"]
    assert "asked for: head on cpu#1\n" in run_command("llamaplan", "show", path).out
    assert run_command("llamaplan", "check", path).code == 0
    assert run_command("llamaplan", "report", path, "--no-compare", "-o", tmp_path / "page.html").code == ExitCode.OK
