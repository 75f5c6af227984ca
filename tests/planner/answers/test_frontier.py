"""The Pareto frontier against brute force."""

import json
import random
from fractions import Fraction
from pathlib import Path

import pytest

from planner.answers.frontier import FrontierPoint, frontier_by_devices, frontier_by_share
from planner.problem.problem import Assignment, Problem, StageChoice
from planner.program.session import SolverSession
from plans.plan import Objective
from tests.conftest import RunCommand
from tests.planner.random_problems import all_chains, random_problem
from tests.planner.worth import worth_of

OBJECTIVES: tuple[Objective, ...] = ("latency", "request", "throughput")


def _values(problem: Problem, objective: Objective) -> list[tuple[int, Fraction, int]]:
    """(time, share, devices) of every chain."""
    chains = list(all_chains(problem))
    worths = [worth_of(problem, chain, objective=objective) for chain in chains]
    return [(worth.time, worth.share, len(chain)) for worth, chain in zip(worths, chains, strict=True)]


def _chain(problem: Problem, point: FrontierPoint) -> Assignment:
    """Return a point's stages as brute force knows them."""
    places = {device.name: place for place, device in enumerate(problem.devices)}
    return tuple(StageChoice(places[stage.device], stage.start_layer, stage.end_layer) for stage in point.stages)


@pytest.mark.parametrize("seed", range(4))
def test_every_point_by_share_is_unbeaten_and_both_ends_are_there(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(8):
        problem, objective = random_problem(rng, max_layers=5, max_devices=3, is_plain=True), rng.choice(OBJECTIVES)
        with SolverSession(("highs",), is_isolated=False) as session:
            points = frontier_by_share(problem, objective=objective, session=session, num_points=4)
        values = _values(problem, objective)
        assert bool(points) == bool(values)
        found = [worth_of(problem, _chain(problem, point), objective=objective) for point in points]
        for worth in found:
            assert not any(
                (t <= worth.time and s < worth.share) or (t < worth.time and s <= worth.share) for t, s, _ in values
            )
        if found:
            assert found[0].share == min(s for _, s, _ in values)
            assert found[-1].time == min(t for t, _, _ in values)
            assert [w.share for w in found] == sorted(w.share for w in found)
            _check_seconds(problem, points, objective)


def _check_seconds(problem: Problem, points: list[FrontierPoint], objective: Objective) -> None:
    for point in points:
        worth = worth_of(problem, _chain(problem, point), objective=objective)
        assert point.seconds == problem.seconds(worth.time, objective)
        assert point.memory_share == float(worth.share)
        assert point.num_devices == len({stage.device for stage in point.stages})


@pytest.mark.parametrize("seed", range(4))
def test_points_by_devices_are_the_least_times(seed: int) -> None:
    rng = random.Random(50 + seed)
    for _ in range(8):
        problem, objective = random_problem(rng, max_layers=5, max_devices=3, is_plain=True), rng.choice(OBJECTIVES)
        with SolverSession(("highs",), is_isolated=False) as session:
            points = frontier_by_devices(problem, objective=objective, session=session)
        values = _values(problem, objective)
        best: dict[int, int] = {}
        for most in range(1, problem.num_devices + 1):
            times = [t for t, _, n in values if n <= most]
            if times and min(times) < min(best.values(), default=min(times) + 1):
                best[most] = min(times)
        found = [worth_of(problem, _chain(problem, p), objective=objective).time for p in points]
        assert found == list(best.values())


def test_command_prints_both_frontiers(run_command: RunCommand, shipped: Path) -> None:
    devices = ("--device", "cpu=345MiB", "--device", "cpu=12MiB", "--device", "rtx4090=605MiB")
    done = run_command("llamaplan", "frontier", shipped, *devices, "--batch-size", 4)
    assert done.code == 0, done.err
    assert "time against memory share (latency):" in done.out
    assert "time against number of devices (latency):" in done.out
    document = json.loads(run_command("llamaplan", "frontier", shipped, *devices, "--json", "--against", "devices").out)
    assert document["time_against_memory_share"] == []
    assert document["time_against_number_of_devices"][0]["status"] == "optimal"


def test_command_refuses_what_makes_no_frontier(run_command: RunCommand, shipped: Path) -> None:
    assert run_command("llamaplan", "frontier", shipped, "--device", "cpu=1MiB").code == 4
    assert run_command("llamaplan", "frontier", shipped, "--points", "1").code == 2
    assert run_command("llamaplan", "frontier", shipped, "--time-limit", "0").code == 2
