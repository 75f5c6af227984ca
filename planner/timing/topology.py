"""Routes between devices: what a cluster's links say about any pair, and what is assumed where they say nothing.

For a pair of devices the first that applies counts:

1. the links stated by name (device or host, either end), alone or in a row: of all routes the one with the least
   sum of latencies + bytes / narrowest bandwidth, for each message size;
2. the stated link of the pair's class (``same_host`` or ``between_hosts``);
3. an assumption: `SAME_HOST`, `SAME_MEMORY` or `LOOPBACK` inside a host; `BETWEEN_HOSTS` between hosts, but only in a
   cluster that states no link between hosts at all. Where some are stated, an unlisted pair is not connected.

A stated link holds in both directions unless its reverse is stated. Devices never relay; of the hosts only the two ends
and those without devices (switches) do. Reaching one's own host costs nothing unless a link between them is stated.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from plans.cluster import Cluster, Device
from plans.plan import Execution


@dataclass(frozen=True, slots=True)
class Route:
    """One way from a device to another: the latencies summed, and the narrowest bandwidth."""

    latency_seconds: float
    bandwidth_bytes_per_second: float

    def seconds(self, num_bytes: int) -> float:
        """Return how long a message of `num_bytes` takes."""
        return self.latency_seconds + num_bytes / self.bandwidth_bytes_per_second


SAME_HOST = Route(20e-6, 12e9)
"""Between devices of one host: a PCIe 4.0 x16 copy (31.5 GB/s nominal, 20-25 GB/s pinned), halved as it passes through
host memory, and the launch of two copies."""

SAME_MEMORY = Route(1e-6, 1e12)
"""Between CPU devices of one host in one process: a pointer is handed over, nothing is copied."""

LOOPBACK = Route(100e-6, 2e9)
"""Between stages of one host in separate processes, one on a CPU: a loopback socket, two copies and two wake-ups."""

BETWEEN_HOSTS = Route(200e-6, 125e6)
"""Between hosts: gigabit Ethernet, 125 MB/s, and the latency of a TCP message."""


class Topology:
    """Answers how long a message takes between two devices.

    Args:
        cluster: devices, hosts and links.
        execution: whether stages share a process; decides what is assumed inside a host.

    Example:
        >>> from plans.cluster import Device
        >>> rates = {"memory_bandwidth_bytes_per_second": 1e10, "flops_per_second": {"fp32": 1e11}}
        >>> a, b = (Device(name=n, kind="cpu", memory_bytes=2**30, **rates) for n in ("cpu#0", "cpu#1"))
        >>> Topology(Cluster(devices=(a, b))).seconds("cpu#0", "cpu#1", 1_000_000)
        2e-06
    """

    def __init__(self, cluster: Cluster, *, execution: Execution = "one_process") -> None:
        self._cluster = cluster
        self._execution = execution
        self._devices = {device.name: device for device in cluster.devices}
        self._classes = {
            link.class_: Route(link.latency_seconds, link.bandwidth_bytes_per_second)
            for link in cluster.links
            if link.class_ is not None
        }
        self._stated = _stated_links(cluster)
        self._has_links_between_hosts = "between_hosts" in self._classes or self._names_two_hosts()
        self._from: dict[str, dict[str, tuple[Route, ...]]] = {}

    def seconds(self, from_device: str, to_device: str, num_bytes: int) -> float:
        """Return the time of one message in seconds; 0 to itself, infinity where there is no way."""
        if from_device == to_device:
            return 0.0
        routes = self.routes(from_device, to_device)
        return min((route.seconds(num_bytes) for route in routes), default=math.inf)

    def routes(self, from_device: str, to_device: str) -> tuple[Route, ...]:
        """Return the routes worth taking for some message size; empty if the pair is not connected."""
        if not self._stated:
            return self._default(from_device, to_device)
        if from_device not in self._from:
            self._from[from_device] = _routes_from(self._cluster, self._stated, self._devices[from_device])
        return self._from[from_device].get(to_device) or self._default(from_device, to_device)

    def explain(self, from_device: str, to_device: str) -> str:
        """Say why there is no way between two devices."""
        a, b = self._devices[from_device].host, self._devices[to_device].host
        return (
            f"no link leads from {from_device} (host {a}) to {to_device} (host {b}): "
            f"state a link between {a} and {b}, or one of class between_hosts"
        )

    def _default(self, from_device: str, to_device: str) -> tuple[Route, ...]:
        a, b = self._devices[from_device], self._devices[to_device]
        if a.host == b.host:
            return (self._classes.get("same_host") or self._inside_host(a, b),)
        if "between_hosts" in self._classes:
            return (self._classes["between_hosts"],)
        return () if self._has_links_between_hosts else (BETWEEN_HOSTS,)

    def _inside_host(self, a: Device, b: Device) -> Route:
        # One process with a CPU stage means gloo, hence sockets, for the whole chain.
        if self._execution == "process_per_stage":
            return LOOPBACK if "cpu" in (a.kind, b.kind) else SAME_HOST
        return SAME_MEMORY if a.kind == b.kind == "cpu" else SAME_HOST

    def _names_two_hosts(self) -> bool:
        hosts = {end: self._devices[end].host if end in self._devices else end for pair in self._stated for end in pair}
        return any(hosts[a] != hosts[b] for a, b in self._stated)


def _stated_links(cluster: Cluster) -> dict[tuple[str, str], Route]:
    """Directed links by the names of their ends; the reverse of a link is itself unless stated."""
    links = {
        (link.from_, link.to): Route(link.latency_seconds, link.bandwidth_bytes_per_second)
        for link in cluster.links
        if link.from_ is not None and link.to is not None
    }
    return {(b, a): route for (a, b), route in links.items()} | links


def _routes_from(
    cluster: Cluster, stated: Mapping[tuple[str, str], Route], source: Device
) -> dict[str, tuple[Route, ...]]:
    """Return the useful routes from `source` to every device it reaches over stated links."""
    names = {device.name for device in cluster.devices}
    routes = {b: [route] for (a, b), route in stated.items() if a == source.name and b in names}
    for device, route in _relayed_routes(_relay_edges(cluster, stated, source), source.name):
        if device in names:
            routes.setdefault(device, []).append(route)
    return {name: tuple(found) for name, found in routes.items()}


def _relayed_routes(edges: Mapping[tuple[str, str], Route], source: str) -> Iterator[tuple[str, Route]]:
    """Yield (reached node, route): for every bandwidth, the least latency over links at least that wide.

    The least of latency + bytes / narrowest bandwidth is no shortest path itself, but it is the shortest in latency
    among the links at least as wide as its narrowest.
    """
    import networkx

    graph: networkx.DiGraph[str] = networkx.DiGraph()
    graph.add_node(source)
    least: dict[str, float] = {}
    by_width = sorted(edges.items(), key=lambda item: -item[1].bandwidth_bytes_per_second)
    for width, group in groupby(by_width, key=lambda item: item[1].bandwidth_bytes_per_second):
        graph.add_weighted_edges_from((a, b, route.latency_seconds) for (a, b), route in group)
        if math.isinf(width):
            continue  # free edges alone lead nowhere
        for node, latency in networkx.single_source_dijkstra_path_length(graph, source).items():
            if node != source and latency < least.get(node, math.inf):
                least[node] = latency
                yield node, Route(float(latency), width)


def _relay_edges(
    cluster: Cluster, stated: Mapping[tuple[str, str], Route], source: Device
) -> dict[tuple[str, str], Route]:
    """Return the directed edges over which a message from `source` may be relayed."""
    host_of = {device.name: device.host for device in cluster.devices}
    ends = set(host_of.values())
    relays = ({host.name for host in cluster.hosts} - ends) | {source.host}
    edges = {
        (a, b): route
        for (a, b), route in stated.items()
        if a in relays or (a == source.name and b not in host_of) or host_of.get(b) == a
    }
    free = Route(0.0, math.inf)
    edges.setdefault((source.name, source.host), free)
    is_uplink_stated = (source.name, source.host) in stated
    for name, host in host_of.items():
        # Free both ways inside one host would be a free copy between its devices: one of the two must be stated.
        if name != source.name and (host != source.host or is_uplink_stated):
            edges.setdefault((host, name), free)
    return edges
