"""The example clusters are read, budgeted, routed and planned for."""

from pathlib import Path

import pytest

from planner.devices.clusters import load_cluster
from planner.timing.costs import predict
from planner.timing.topology import Topology
from plans.cluster import Cluster
from plans.stages import StageRange
from tests.planner.cases import tiny_profile, workload

EXAMPLES = Path(__file__).parents[2] / "plans" / "examples"
CLUSTERS = ("workstation", "lab", "rented")


@pytest.mark.parametrize("name", CLUSTERS)
def test_an_example_cluster_reads_back_byte_for_byte(name: str) -> None:
    cluster = Cluster.read(EXAMPLES / f"{name}.json")
    text = cluster.to_json()
    assert Cluster.from_json(text.encode(), where=name).to_json() == text


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_device_of_an_example_gets_a_budget_and_reaches_every_other(name: str) -> None:
    cluster = load_cluster(EXAMPLES / f"{name}.json")
    topology = Topology(cluster)
    for a in cluster.devices:
        assert a.budget_bytes is not None
        assert 0 < a.budget_bytes < a.memory_bytes
        assert all(topology.seconds(a.name, b.name, 1 << 20) < 1 for b in cluster.devices)


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_chain_over_an_example_is_predicted(name: str) -> None:
    cluster = load_cluster(EXAMPLES / f"{name}.json")
    first, second = cluster.devices[0].name, cluster.devices[-1].name
    stages = (StageRange(first, 0, 3, True, False), StageRange(second, 3, 4, False, True))
    _times, prediction = predict(tiny_profile(), workload=workload(), cluster=cluster, stages=stages)
    assert 0 < prediction.seconds_per_token < 1
    assert 0 < prediction.max_memory_share < 1


def test_the_labs_slow_box_is_reached_through_both_switches() -> None:
    topology = Topology(load_cluster(EXAMPLES / "lab.json"))
    (route,) = topology.routes("bench/gpu", "mini/cpu")
    assert route.bandwidth_bytes_per_second == 117e6
    assert route.latency_seconds == pytest.approx(110e-6)


def test_the_rented_cluster_is_slower_on_the_way_back() -> None:
    topology = Topology(load_cluster(EXAMPLES / "rented.json"))
    there = topology.seconds("north/a100-0", "south/t4", 1 << 20)
    back = topology.seconds("south/t4", "north/a100-0", 1 << 20)
    assert back > 1.5 * there
