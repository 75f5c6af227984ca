"""A plan that was changed by hand is found out, whatever it claims."""

import json
from pathlib import Path
from typing import Any

import pytest

from planner import solve_model
from planner.answers.check import check_against_model, recompute
from plans.errors import IntegrityError
from plans.plan import Plan

DEVICES = ["cpu=700MiB", "cpu=700MiB"]
QUESTIONS: dict[str, dict[str, Any]] = {
    "compute": {},
    "custom": {"layers": [4, 3]},
    "memory": {"strategy": "memory"},
    "mixed": {"strategy": "mixed"},
    "request": {"objective": "request"},
    "throughput": {"objective": "throughput"},
    "uniform": {"strategy": "uniform"},
}


@pytest.mark.row("L8")
@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("claim", [{"bound": 0.0}, {"gap": 0.5}, {"objective": 1e-9, "bound": 1e-9}], ids=str)
def test_a_proof_of_another_value_is_refused(name: str, claim: dict[str, float], shipped: Path) -> None:
    plan = solve_model(shipped, devices=DEVICES, **QUESTIONS[name])
    recompute(plan, where="plan.json")
    altered = plan.model_copy(update={"proof": plan.proof.model_copy(update=claim)})
    if name == "mixed" and "objective" in claim:
        return  # a weighted sum, of which the plan does not hold all parts
    with pytest.raises(IntegrityError, match=r"plan\.json:/proof/(objective|bound|gap): the plan says"):
        recompute(altered, where="plan.json")


@pytest.mark.row("L8")
@pytest.mark.parametrize(
    "change",
    [{"kv_bytes_per_token": 2}, {"kv_window_tokens": 16}, {"state_bytes_per_sequence": 8}, {"weight_bytes": 1 << 20}],
    ids=str,
)
def test_layers_that_keep_other_bytes_than_the_model_says_are_refused(change: dict[str, int], shipped: Path) -> None:
    text = json.loads(solve_model(shipped, devices=DEVICES).to_json())
    text["profile"]["units"][2] |= change
    plan = Plan.from_json(json.dumps(text).encode(), where="plan.json")
    with pytest.raises(IntegrityError, match=rf"the plan counts .* {next(iter(change))} for layer 1, the model gives"):
        check_against_model(plan, shipped)
