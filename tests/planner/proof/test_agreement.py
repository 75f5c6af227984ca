"""Integer program, certificate and brute force on what Hypothesis comes up with; larger ones without brute force."""

import random
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.answers.settle import minimise
from planner.problem.goal import Goal
from planner.problem.problem import Problem
from planner.program.session import SolverSession
from planner.program.solve import solve_ilp
from planner.proof.certificate import certify
from plans.plan import Objective
from tests.planner.random_problems import MILLISECOND, all_values, brute_force, random_problem

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@st.composite
def _problems(draw: st.DrawFn) -> Problem:
    rng = draw(st.randoms(use_true_random=False))
    return random_problem(rng, max_layers=4, max_devices=3, has_rules=draw(st.booleans()))


@st.composite
def _goals(draw: st.DrawFn) -> Goal:
    objective: Objective = draw(st.sampled_from(["latency", "request", "throughput"]))
    weight = draw(st.fractions(0, 1, max_denominator=8))
    return draw(
        st.sampled_from(
            [
                Goal("time", objective),
                Goal("share", objective),
                Goal("mixed", objective, weight=weight, best_time=3 * MILLISECOND, best_share=Fraction(1, 3)),
            ]
        )
    )


@QUICK
@given(_problems(), _goals())
def test_program_certificate_and_brute_force_agree(problem: Problem, goal: Goal) -> None:
    expected = brute_force(all_values(problem, goal.objective), goal)
    certificate = certify(problem, goal)
    assert certificate is not None
    assert certificate.value == expected
    assert solve_ilp(problem, goal, solvers=("highs",)).value == expected


@QUICK
@given(_problems(), st.integers(1, 30))
def test_a_tighter_share_never_helps_and_a_looser_one_never_hurts(problem: Problem, tenths: int) -> None:
    limited = problem.with_share_limit(Fraction(tenths, 30))
    best, bound = certify(problem, Goal("time", "latency")), certify(limited, Goal("time", "latency"))
    assert best is not None
    assert bound is not None
    if bound.value is not None:
        assert best.value is not None
        assert best.value <= bound.value


@pytest.mark.parametrize("seed", range(4))
def test_program_and_certificate_agree_beyond_brute_force(seed: int) -> None:
    rng = random.Random(700 + seed)
    for _ in range(4):
        problem = random_problem(rng, max_layers=12, max_devices=6, is_plain=True)
        problem = replace(problem, keep_order=rng.random() < 0.3)
        for goal in (Goal("time", "latency"), Goal("time", "throughput"), Goal("share", "latency")):
            with SolverSession(("highs",), is_isolated=False, time_limit=60) as session:
                settled = minimise(problem, goal, session=session)  # raises where the two disagree
            assert settled.certified_by is not None
            assert settled.solver == "HiGHS"
