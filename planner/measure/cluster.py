"""A cluster with measured devices: which of them are on this machine, what is timed on each, and where it is kept."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, permutations
from typing import TYPE_CHECKING, Any

from planner.devices.machine import Machine, inspect_machine
from planner.measure.points import Points, choose_points, default_checkpoint, last_cache_bytes
from planner.measure.process import Footprint, Request, measure_footprint
from planner.model.profile import build_profile
from plans.checkpoint.units import Checkpoint
from plans.cluster import Cluster, Device, Host, Link, Timings
from plans.dtypes import DtypeName
from plans.errors import UsageError
from plans.profile import ModelProfile

if TYPE_CHECKING:
    from planner.measure.layers import Measured
    from planner.measure.process import PathName
from statistics import median

from planner.timing.roofline import Work, bytes_read, flops


def with_measured_rates(device: Device, timings: Timings, *, profile: ModelProfile) -> Device:
    """Return the device with bandwidth and FLOP rate as its timings of one shape show them.

    Bandwidth is what decoding one sequence reads per second, the rate what the longest prompts compute per second;
    both include all overhead, so the fixed overhead of a unit becomes 0.

    Args:
        device: the device that was timed.
        timings: its curves.
        profile: the shape they belong to.
    """
    layer = profile.layers[0]
    longest = max(tokens for tokens, _past, _batch, _seconds in timings.prefill_seconds_per_layer)
    computes = [
        flops(layer, work=Work(tokens, past, batch)) / seconds
        for tokens, past, batch, seconds in timings.prefill_seconds_per_layer
        if tokens == longest and seconds
    ]
    rates = dict(device.flops_per_second) | {timings.dtype: median(computes)}
    return device.model_copy(
        update={
            "memory_bandwidth_bytes_per_second": median(read_rates(timings, profile)),
            "flops_per_second": rates,
            "unit_overhead_seconds": 0.0,
        }
    )


def read_rates(timings: Timings, profile: ModelProfile) -> list[float]:
    """Return the bytes per second that every measured decode step of one sequence read, ascending."""
    return sorted(
        bytes_read(profile.layers[0], work=Work(1, context - 1, batch), profile=profile) / seconds
        for context, batch, seconds in timings.decode_seconds_per_layer
        if batch == 1 and seconds
    )


PATHS: "tuple[PathName, ...]" = ("reference", "fast")

Progress = Callable[[str, int, int], None]
"""Told what is done, how many visits of it are over, and how many there are."""


@dataclass(frozen=True, slots=True)
class MeasuredCluster:
    """The cluster with measured curves.

    Attributes:
        cluster: as it was, with timings, overheads and links of this machine replaced.
        measured: names of the devices that were timed.
        warnings: remarks for a person.
    """

    cluster: Cluster
    measured: tuple[str, ...]
    warnings: tuple[str, ...]


def measure_cluster(
    cluster: Cluster,
    *,
    checkpoint: Checkpoint | None,
    dtype: DtypeName | None = None,
    host: str | None = None,
    threads: int | None = None,
    progress: Progress = lambda _what, _done, _total: None,
) -> MeasuredCluster:
    """Time every device of this machine.

    Args:
        cluster: what is there; devices of other machines stay as they are.
        checkpoint: the shape to time, with real weights if it has them; None for a built-in one, which then only
            replaces the devices' stated rates.
        dtype: what to compute in; None for the stored one.
        host: which of several hosts this machine is.
        threads: CPU threads; None for the default of torch.
        progress: told how far it is.

    Raises:
        UsageError: it is not clear which devices are here.
        MachineError: a layer does not fit into memory.
        InputError: the runtime does not run this family.
    """
    from planner.measure.layers import cpu_threads

    machine = inspect_machine()
    here = devices_here(cluster, machine, host=host)
    subject = checkpoint or default_checkpoint()
    profile = build_profile(subject, dtype=dtype)
    num_threads = cpu_threads(threads)
    measured = _Results(cluster)
    kinds = dict.fromkeys(plain_name(device.name) for device in here)
    for kind in kinds:
        same = [device for device in here if plain_name(device.name) == kind]
        cache = last_cache_bytes() if kind == "cpu" else 0
        points = choose_points(profile, same[0], free_bytes=machine.free_bytes[kind], cache_bytes=cache)
        timed = _time_device(subject, profile, kind, points, progress)
        used = _footprint(subject, profile, kind, points, num_threads, progress)
        is_any = checkpoint is None
        measured.add(
            same, timings=[found.timings for found in timed], footprint=used, profile=profile, is_any_shape=is_any
        )
        if any(found.is_disturbed for found in timed):
            measured.warn(f"other programs were busy while {kind} was timed; measure again when they are not")
    measured.add_links(_hop_links(here, progress))
    return measured.result(tuple(device.name for device in here))


def devices_here(cluster: Cluster, machine: Machine, *, host: str | None) -> tuple[Device, ...]:
    """Return the devices of a cluster that are on this machine.

    Raises:
        UsageError: several hosts and none is named, an unknown one, or nothing of the cluster is here.
    """
    hosts = list(dict.fromkeys(device.host for device in cluster.devices))
    if host is not None and host not in hosts:
        raise UsageError(f"--host {host} has no devices in the cluster", expected=f"one of {', '.join(hosts)}")
    if host is None and len(hosts) > 1:
        raise UsageError(
            f"the cluster has {len(hosts)} hosts",
            hint=f"say which of them this machine is with --host: {', '.join(hosts)}",
        )
    present = {device.name for device in machine.cluster.devices}
    here = tuple(
        device for device in cluster.devices if device.host == (host or hosts[0]) and plain_name(device.name) in present
    )
    if not here:
        raise UsageError(
            "no device of the cluster is on this machine",
            expected=f"a device called {' or '.join(sorted(present))}",
            hint="measure on the machine that has them",
        )
    return here


def plain_name(name: str) -> str:
    """Return the name that the device has on its own machine: `cpu` for `cpu#1`, `cuda:0` for `box1/cuda:0`."""
    return name.rsplit("/", 1)[-1].split("#", 1)[0]


def _time_device(
    checkpoint: Checkpoint, profile: ModelProfile, name: str, points: Points, progress: Progress
) -> "list[Measured]":
    """Time the reference path, and the fast one where it serves."""
    from planner.measure.layers import measure_device, num_visits

    found = []
    for path in PATHS:
        what, counter, total = f"timing {profile.model.name} on {name}, {path} path", count(1), num_visits(points)
        progress(what, 0, total)

        def step(what: str = what, counter: "count[int]" = counter, total: int = total) -> None:
            progress(what, next(counter), total)

        measured = measure_device(checkpoint, profile, device=name, points=points, path=path, progress=step)
        found += [measured] if measured is not None else []
    return found


def _footprint(
    checkpoint: Checkpoint, profile: ModelProfile, name: str, points: Points, threads: int, progress: Progress
) -> Footprint:
    progress(f"memory of a process on {name}", 0, 1)
    model = str(checkpoint.path.absolute()) if checkpoint.path.exists() else None
    request = Request(model, profile.dtype, name, points.num_prefill_layers, threads)
    footprint = measure_footprint(profile, request)
    progress(f"memory of a process on {name}", 1, 1)
    return footprint


def _hop_links(here: tuple[Device, ...], progress: Progress) -> Iterator[Link]:
    """Yield a link for every pair of devices that copies; CPU devices of one process hand over a pointer."""
    from planner.measure.layers import measure_copy

    pairs = [(a, b) for a, b in permutations(here, 2) if plain_name(a.name) != plain_name(b.name)]
    for number, (a, b) in enumerate(pairs):
        progress("copies between devices", number, len(pairs))
        latency, bandwidth = measure_copy(plain_name(a.name), plain_name(b.name))
        yield make_link(a.name, b.name, latency_seconds=latency, bandwidth_bytes_per_second=bandwidth)


class _Results:
    """The cluster as it fills with results."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._devices = {device.name: device for device in cluster.devices}
        self._process_bytes: dict[str, int] = {}
        self._links: list[Link] = []
        self._warnings: list[str] = []

    def warn(self, text: str) -> None:
        self._warnings.append(text)

    def add(
        self,
        devices: list[Device],
        *,
        timings: list[Timings],
        footprint: Footprint,
        profile: ModelProfile,
        is_any_shape: bool,
    ) -> None:
        for device in devices:
            changed = (
                with_measured_rates(device, timings[-1], profile=profile)
                if is_any_shape
                else device.model_copy(update={"timings": replace_timings(device.timings, timings)})
            )
            if device.kind == "cpu":
                self._process_bytes[device.host] = footprint.process_bytes
            else:
                self._process_bytes.setdefault(device.host, footprint.process_bytes)
                changed = changed.model_copy(update={"fixed_overhead_bytes": footprint.device_bytes})
            self._devices[device.name] = changed

    def add_links(self, links: Iterator[Link]) -> None:
        self._links += links

    def result(self, measured: tuple[str, ...]) -> MeasuredCluster:
        hosts = self._cluster.hosts or tuple(Host(name=name) for name in dict.fromkeys(
            device.host for device in self._cluster.devices))  # fmt: skip
        hosts = tuple(
            host.model_copy(update={"process_overhead_bytes": self._process_bytes[host.name]})
            if host.name in self._process_bytes
            else host
            for host in hosts
        )
        cluster = self._cluster.model_copy(
            update={
                "hosts": hosts,
                "devices": tuple(self._devices[device.name] for device in self._cluster.devices),
                "links": merge_links(self._cluster.links, self._links),
            }
        )
        return MeasuredCluster(cluster, measured, tuple(self._warnings))


def make_link(from_name: str, to_name: str, *, latency_seconds: float, bandwidth_bytes_per_second: float) -> Link:
    """Return a link between two devices or hosts."""
    ends: dict[str, Any] = {"from": from_name, "to": to_name}
    return Link(**ends, latency_seconds=latency_seconds, bandwidth_bytes_per_second=bandwidth_bytes_per_second)


def replace_timings(known: tuple[Timings, ...], new: list[Timings]) -> tuple[Timings, ...]:
    """Return timings with new ones in place of all of the same shape and dtype."""
    replaced = {(timings.profile, timings.dtype) for timings in new}
    kept = [timings for timings in known if (timings.profile, timings.dtype) not in replaced]
    return tuple(sorted([*kept, *new], key=lambda timings: (timings.profile, timings.dtype, timings.path)))


def merge_links(known: tuple[Link, ...], new: list[Link]) -> tuple[Link, ...]:
    """Return links with new ones in place of those from and to the same ends."""
    ends = {(link.from_, link.to) for link in new}
    return (*(link for link in known if link.class_ is not None or (link.from_, link.to) not in ends), *new)
