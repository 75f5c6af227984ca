"""Devices that share a memory bus: program, certificate and brute force agree on what a step then takes."""

import random
from dataclasses import replace

import pytest

from planner.answers.settle import minimise
from planner.answers.solve import solve
from planner.problem.goal import Goal
from planner.program.session import SolverSession
from planner.proof.certificate import certify
from plans.cluster import Cluster, Host
from tests.planner.cases import asked, cluster, device, tiny_profile, workload
from tests.planner.random_problems import all_values, brute_force, random_problem

GOALS = (Goal("time", "throughput"), Goal("share", "throughput"))


@pytest.mark.parametrize("seed", range(4))
def test_the_certificate_is_brute_force_or_says_nothing(seed: int) -> None:
    rng, num_slowed = random.Random(seed), 0
    for _ in range(20):
        problem = random_problem(rng, max_layers=5, has_rules=rng.random() < 0.5, has_buses=True)
        is_whole = problem.has_identical_layers and not problem.keep_order
        values = all_values(problem, "throughput")
        fastest = brute_force(values, GOALS[0])
        limit = None if fastest is None else Goal("share", "throughput", max_time=int(fastest))
        for goal in (*GOALS, limit):
            certificate = None if goal is None else certify(problem, goal)
            assert certificate is not None or goal is None or not is_whole
            if certificate is not None and goal is not None:
                assert certificate.value == brute_force(values, goal)
        free = brute_force(all_values(replace(problem, buses=()), "throughput"), GOALS[0])
        num_slowed += free != fastest
    assert num_slowed


@pytest.mark.parametrize("seed", range(3))
def test_the_program_is_brute_force(seed: int) -> None:
    rng = random.Random(50 + seed)
    for _ in range(4):
        problem = random_problem(rng, max_layers=4, max_devices=3, has_buses=True)
        wanted = brute_force(all_values(problem, "throughput"), GOALS[0])
        with SolverSession(("highs",), is_isolated=False, time_limit=60) as session:
            found = minimise(problem, GOALS[0], session=session)
        assert found.value == wanted


def two_cpus(bandwidth: float | None) -> Cluster:
    host = Host(name="local", memory_bandwidth_bytes_per_second=bandwidth)
    slow = (device(name, memory_bandwidth_bytes_per_second=1e8) for name in ("cpu#0", "cpu#1"))
    return cluster(*slow, hosts=(host,))


def best_rate(offered: Cluster) -> float:
    load = workload(requests_in_flight=4)
    question, effort = asked(tiny_profile(), cluster=offered, workload=load, objective="throughput")
    plan = solve(question, effort)
    assert plan.proof.certified_by is not None
    return plan.prediction.pipelined_tokens_per_second


def test_a_second_process_on_the_same_bus_brings_nothing() -> None:
    alone = best_rate(cluster(device("cpu#0", memory_bandwidth_bytes_per_second=1e8)))
    assert best_rate(two_cpus(1e8)) == pytest.approx(alone, rel=1e-3)
    assert best_rate(two_cpus(None)) > 1.8 * alone


def test_a_cluster_that_says_nothing_of_a_bus_is_written_as_before() -> None:
    text = two_cpus(None).to_json()
    assert "memory_bandwidth" not in text.partition('"hosts"')[2]
    assert Cluster.from_json(two_cpus(1e10).to_json().encode(), where="cluster") == two_cpus(1e10)
