"""Routes between devices: stated links, classes, assumptions, and what is not connected."""

import math
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.timing.topology import BETWEEN_HOSTS, LOOPBACK, SAME_HOST, SAME_MEMORY, Topology
from plans.cluster import Cluster, Host, Link
from tests.planner.cases import class_link, cluster, device, link

MIB = 1 << 20


def boxes(*links: Link, hosts: tuple[str, ...] = ("a", "b", "switch")) -> Cluster:
    """GPUs a0 and a1 on host a, b0 on host b, and a host without devices."""
    devices = [device(name, host=name[0], kind="cuda") for name in ("a0", "a1", "b0")]
    return cluster(*devices, links=links, hosts=tuple(Host(name=name) for name in hosts))


def test_a_message_to_oneself_takes_no_time() -> None:
    assert Topology(boxes()).seconds("a0", "a0", MIB) == 0


def test_a_stated_pair_costs_its_latency_and_its_bytes() -> None:
    topology = Topology(boxes(link("a0", "a1", bandwidth=1e9, latency=1e-3)))
    assert topology.seconds("a0", "a1", 32_768) == pytest.approx(1.032768e-3)


def test_a_link_holds_both_ways_unless_the_reverse_is_stated() -> None:
    there = link("a0", "a1", bandwidth=1e9, latency=1e-3)
    back = link("a1", "a0", bandwidth=1e8, latency=2e-3)
    assert Topology(boxes(there)).seconds("a1", "a0", 0) == 1e-3
    assert Topology(boxes(there, back)).seconds("a1", "a0", 0) == 2e-3
    assert Topology(boxes(there, back)).seconds("a0", "a1", 0) == 1e-3


def test_a_link_between_hosts_serves_their_devices() -> None:
    topology = Topology(boxes(link("a", "b", bandwidth=1e9, latency=1e-3)))
    assert topology.seconds("a0", "b0", 10**6) == pytest.approx(2e-3)
    assert topology.seconds("b0", "a1", 10**6) == pytest.approx(2e-3)
    assert topology.seconds("a0", "a1", MIB) == SAME_HOST.seconds(MIB)


def test_a_switch_relays_at_the_narrowest_bandwidth_and_the_summed_latency() -> None:
    topology = Topology(
        boxes(
            link("a", "switch", bandwidth=1e9, latency=1e-3),
            link("b", "switch", bandwidth=1e8, latency=2e-3),
        )
    )
    assert topology.seconds("a0", "b0", 10**6) == pytest.approx(3e-3 + 10**6 / 1e8)


def test_the_best_route_depends_on_the_size_of_the_message() -> None:
    near = link("a", "b", bandwidth=1e7, latency=1e-4)
    wide = (
        link("a", "switch", bandwidth=1e10, latency=1e-3),
        link("b", "switch", bandwidth=1e10, latency=1e-3),
    )
    topology = Topology(boxes(near, *wide))
    assert topology.seconds("a0", "b0", 100) == pytest.approx(1e-4 + 100 / 1e7)
    assert topology.seconds("a0", "b0", 10**8) == pytest.approx(2e-3 + 10**8 / 1e10)


def test_neither_devices_nor_hosts_with_devices_relay() -> None:
    devices = [device(name, host=name[0]) for name in ("a0", "b0", "c0")]
    links = (link("a", "b", bandwidth=1e9, latency=1e-3), link("b", "c", bandwidth=1e9, latency=1e-3))
    topology = Topology(cluster(*devices, links=links))
    assert math.isinf(topology.seconds("a0", "c0", MIB))
    assert "host a" in topology.explain("a0", "c0")
    links = (link("a0", "b0", bandwidth=1e9, latency=1e-3), link("b0", "c0", bandwidth=1e9, latency=1e-3))
    assert math.isinf(Topology(cluster(*devices, links=links)).seconds("a0", "c0", MIB))


def test_the_way_out_of_a_device_counts_where_it_is_stated() -> None:
    links = (link("a", "b", bandwidth=1e9, latency=1e-3), link("a0", "a", bandwidth=1e8, latency=1e-4))
    topology = Topology(boxes(*links))
    assert topology.seconds("a0", "b0", 10**6) == pytest.approx(1.1e-3 + 1e-2)
    assert topology.seconds("a1", "b0", 10**6) == pytest.approx(2e-3)
    assert topology.seconds("a0", "a1", 10**6) == pytest.approx(1e-4 + 1e-2)
    assert topology.seconds("a1", "a0", 10**6) == pytest.approx(1e-4 + 1e-2)


def test_a_class_serves_the_pairs_that_no_named_link_reaches() -> None:
    topology = Topology(
        boxes(
            class_link("same_host", bandwidth=1e9, latency=1e-3),
            class_link("between_hosts", bandwidth=1e8, latency=1e-2),
            link("a1", "b0", bandwidth=1e9, latency=1e-4),
        )
    )
    assert topology.seconds("a0", "a1", 0) == 1e-3
    assert topology.seconds("a0", "b0", 0) == 1e-2
    assert topology.seconds("a1", "b0", 0) == 1e-4


def test_without_any_link_gigabit_ethernet_is_assumed_between_hosts() -> None:
    assert Topology(boxes()).seconds("a0", "b0", MIB) == BETWEEN_HOSTS.seconds(MIB)


def test_once_links_between_hosts_are_stated_the_others_are_not_connected() -> None:
    topology = Topology(boxes(link("a", "switch", bandwidth=1e9, latency=1e-3)))
    assert math.isinf(topology.seconds("a0", "b0", MIB))
    assert topology.routes("a0", "b0") == ()


def test_a_link_inside_a_host_says_nothing_about_hosts() -> None:
    topology = Topology(boxes(link("a0", "a1", bandwidth=1e9, latency=1e-3)))
    assert topology.seconds("a0", "b0", MIB) == BETWEEN_HOSTS.seconds(MIB)


def test_processors_of_one_process_hand_over_a_pointer_and_processes_use_a_socket() -> None:
    pair = cluster(device("cpu#0"), device("cpu#1"))
    assert Topology(pair).seconds("cpu#0", "cpu#1", MIB) == SAME_MEMORY.seconds(MIB)
    assert Topology(pair, execution="process_per_stage").seconds("cpu#0", "cpu#1", MIB) == LOOPBACK.seconds(MIB)
    gpus = cluster(device("g0", kind="cuda"), device("g1", kind="cuda"))
    assert Topology(gpus, execution="process_per_stage").seconds("g0", "g1", MIB) == SAME_HOST.seconds(MIB)


# --- against every simple route, one by one -----------------------------------------------------------------------

HOSTS = ("a", "b", "s", "t")
ENDS = ("a0", "a1", "b0", *HOSTS)
Edges = dict[tuple[str, str], tuple[float, float]]


@st.composite
def stated_edges(draw: st.DrawFn) -> Edges:
    """Some links between hosts a and b (with devices), switches s and t, and the devices themselves."""
    pairs = [(x, y) for x in ENDS for y in ENDS if x != y]
    chosen = draw(st.lists(st.sampled_from(pairs), min_size=1, max_size=9, unique=True))
    weights = st.tuples(st.sampled_from([1e6, 1e7, 1e8, 1e9]), st.sampled_from([1e-5, 1e-4, 1e-3, 1e-2]))
    return {pair: draw(weights) for pair in chosen}


def brute_force(edges: Edges, a: str, b: str, num_bytes: int) -> float:
    """The least time over all chains of named links through switches and the ends' own hosts."""
    both = {(y, x): weight for (x, y), weight in edges.items()} | edges
    free = (math.inf, 0.0)
    steps = dict(both)
    steps.setdefault((a, a[0]), free)
    if a[0] != b[0] or (a, a[0]) in both:
        steps.setdefault((b[0], b), free)
    best = math.inf
    relays = {"s", "t", a[0], b[0]}
    for length in range(len(relays) + 1):
        for middle in permutations(relays, length):
            path = (a, *middle, b)
            # the far host relays to its own device alone
            if any(x == b[0] != a[0] and y != b for x, y in pairwise(path)):
                continue
            weights = [steps.get(pair) for pair in pairwise(path)]
            if None in weights:
                continue
            known = [weight for weight in weights if weight is not None]
            narrowest = min(weight[0] for weight in known)
            if math.isinf(narrowest):
                continue
            best = min(best, sum(weight[1] for weight in known) + num_bytes / narrowest)
    return best


@given(edges=stated_edges(), num_bytes=st.sampled_from([0, 1000, 10**6, 10**9]))
def test_the_chosen_route_is_the_best_of_all_simple_ones(edges: Edges, num_bytes: int) -> None:
    links = tuple(link(a, b, bandwidth=width, latency=latency) for (a, b), (width, latency) in edges.items())
    topology = Topology(boxes(*links, hosts=HOSTS))
    for a, b in permutations(("a0", "a1", "b0"), 2):
        best = brute_force(edges, a, b, num_bytes)
        if math.isinf(best):  # no named route: an assumption, or none
            assumed = {SAME_HOST.seconds(num_bytes), BETWEEN_HOSTS.seconds(num_bytes), math.inf}
            assert topology.seconds(a, b, num_bytes) in assumed
        else:
            assert topology.seconds(a, b, num_bytes) == pytest.approx(best)
