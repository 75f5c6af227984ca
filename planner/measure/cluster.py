"""A cluster with measured devices: which of them are on this machine, what is timed on each, and where it is kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, permutations
from typing import TYPE_CHECKING, Any

from planner.devices.machine import Machine, inspect_machine, usable_cores
from planner.measure.points import Points, choose_points, default_checkpoint, last_cache_bytes
from planner.measure.process import Footprint, Request, measure_footprint
from planner.measure.processor.bus import read_together
from planner.model.profile import build_profile
from planner.model.widths import Packed
from plans.checkpoint.units import Checkpoint
from plans.cluster import Cluster, Device, Host, Link, Timings
from plans.dtypes import DtypeName
from plans.errors import UsageError
from plans.profile import ModelProfile, PackedName

if TYPE_CHECKING:
    from planner.measure.layers import Measured
    from planner.measure.process import PathName
    from planner.measure.stand_in import Subject
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


CPU = "cpu"
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
    widths: Sequence[Packed | None] = (None,),
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
        widths: of the layers that are timed, None for as they are stored; others are timed with random weights.
        host: which of several hosts this machine is.
        threads: CPU threads; None for the default of torch.
        progress: told how far it is.

    Raises:
        UsageError: it is not clear which devices are here.
        MachineError: a layer does not fit into memory.
        InputError: the runtime does not run this family.
    """
    from planner.measure.layers import cpu_threads
    from planner.measure.stand_in import subjects_of

    machine = inspect_machine()
    here = devices_here(cluster, machine, host=host)
    subject = checkpoint or default_checkpoint()
    profile = build_profile(subject, dtype=dtype)
    num_threads = cpu_threads(threads)
    measured = _Results(cluster)
    subjects = [found for width in widths for found in subjects_of(subject, profile, width)]
    kinds = dict.fromkeys(plain_name(device.name) for device in here)
    for kind in kinds:
        same = [device for device in here if plain_name(device.name) == kind]
        times = [
            _measure_kind(one, same[0], machine.free_bytes[kind], threads=num_threads, progress=progress)
            for one in subjects
        ]
        measured.add(same, times, shape=profile if checkpoint is None else None)
        if kind == CPU and len(same) > 1:
            progress("what the CPUs read together", 0, 1)
            rate = _bus_rate(times, len(same), threads=num_threads)
            progress("what the CPUs read together", 1, 1)
            measured.add_bus(same[0].host, rate)
            if rate is None:
                measured.warn("what the CPUs read together could not be measured: a plan counts on each by itself")
        if any(found.is_disturbed for found in times):
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


@dataclass(frozen=True, slots=True)
class _Times:
    """What was found of one subject on one kind of device."""

    timings: tuple[Timings, ...]
    footprint: Footprint
    is_disturbed: bool
    timed_bytes: int
    """Weights of the layers that were timed together."""
    read_rate: float
    """The most bytes per second that a layer or the head was seen to read."""


def _measure_kind(subject: "Subject", device: Device, free_bytes: int, *, threads: int, progress: Progress) -> _Times:
    """Time a subject on a device of this machine, and what a process needs for it."""
    kind = plain_name(device.name)
    cache = last_cache_bytes() if kind == "cpu" else 0
    points = choose_points(subject.profile, device, free_bytes=free_bytes, cache_bytes=cache)
    progress(_what(subject.profile, kind, ""), 0, 1)
    with subject.opened(points.num_layers) as checkpoint:
        timed = _time_device(checkpoint, subject.profile, kind, points, progress)
        used = _footprint(checkpoint, subject.profile, kind, points, threads, progress)
    timings = tuple(timings for found in timed for timings in found.timings)
    return _Times(
        timings,
        used,
        is_disturbed=any(found.is_disturbed for found in timed),
        timed_bytes=points.num_layers * subject.profile.layers[0].weight_bytes,
        read_rate=max((rate for one in timings for rate in _all_read_rates(one, subject.profile)), default=0.0),
    )


def _all_read_rates(timings: Timings, profile: ModelProfile) -> Iterator[float]:
    """Yield the bytes per second that steps of any number of sequences read in a layer, and in the head."""
    layer, head = profile.layers[0], profile.head
    for context, batch, seconds in timings.decode_seconds_per_layer:
        if seconds and (timings.profile, timings.weights) == (layer.shapes_sha256, layer.weights):
            yield bytes_read(layer, work=Work(1, context - 1, batch), profile=profile) / seconds
    for batch, seconds in timings.head_seconds:
        if seconds and timings.weights == head.weights:
            yield bytes_read(head, work=Work(1, 0, batch), profile=profile) / seconds


def _bus_rate(times: "Sequence[_Times]", num_devices: int, *, threads: int) -> float | None:
    """Measure what so many processes read together; no less than one of them was seen to read."""
    num_bytes = max(found.timed_bytes for found in times)
    each = max(1, min(threads, usable_cores() // num_devices))  # as `llamarun` shares the cores out
    rate = read_together(num_devices, num_bytes=num_bytes, threads=each)
    return None if rate is None else max(rate, *(found.read_rate for found in times))


def _what(profile: ModelProfile, name: str, path: str) -> str:
    stored = profile.layers[0].weights
    layers = f"{profile.model.name} in {stored}" if stored is not None else profile.model.name
    return f"timing {layers} on {name}" + (f", {path} path" if path else "")


def _time_device(
    checkpoint: Checkpoint, profile: ModelProfile, name: str, points: Points, progress: Progress
) -> "list[Measured]":
    """Time the reference path, and the fast one where it serves.

    Of packed layers the reference path is timed only where nothing else serves, and then a single layer: it is there
    for comparisons, and takes seconds for a step of a large model.
    """
    from planner.measure.layers import measure_device, num_visits

    is_packed, found = profile.layers[0].weights is not None, list["Measured"]()
    for path in reversed(PATHS) if is_packed else PATHS:
        if is_packed and found:
            break
        if is_packed and path == "reference" and name == "cpu":
            points = replace(points, num_layers=1, num_prefill_layers=1)
        what, counter, total = _what(profile, name, path), count(1), num_visits(points)
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
        self._buses: dict[str, float | None] = {}
        self._links: list[Link] = []
        self._warnings: list[str] = []

    def warn(self, text: str) -> None:
        self._warnings.append(text)

    def add(self, devices: list[Device], times: Sequence[_Times], *, shape: ModelProfile | None) -> None:
        """Take what was found; with a `shape` that stands for any, only its rates. What needs most memory counts."""
        timings = [timings for found in times for timings in found.timings]
        process_bytes = max(found.footprint.process_bytes for found in times)
        for device in devices:
            changed = (
                with_measured_rates(device, timings[-1], profile=shape)
                if shape is not None
                else device.model_copy(update={"timings": replace_timings(device.timings, timings)})
            )
            if device.kind == "cpu":
                self._process_bytes[device.host] = process_bytes
            else:
                self._process_bytes.setdefault(device.host, process_bytes)
                fixed = max(found.footprint.device_bytes for found in times)
                changed = changed.model_copy(update={"fixed_overhead_bytes": fixed})
            self._devices[device.name] = changed

    def add_bus(self, host: str, bytes_per_second: float | None) -> None:
        self._buses[host] = bytes_per_second

    def add_links(self, links: Iterator[Link]) -> None:
        self._links += links

    def result(self, measured: tuple[str, ...]) -> MeasuredCluster:
        hosts = self._cluster.hosts or tuple(Host(name=name) for name in dict.fromkeys(
            device.host for device in self._cluster.devices))  # fmt: skip
        found: dict[str, dict[str, Any]] = {}
        for name, num_bytes in self._process_bytes.items():
            found.setdefault(name, {})["process_overhead_bytes"] = num_bytes
        for name, rate in self._buses.items():
            found.setdefault(name, {})["memory_bandwidth_bytes_per_second"] = rate
        hosts = tuple(host.model_copy(update=found.get(host.name, {})) for host in hosts)
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


def replace_timings(known: tuple[Timings, ...], new: Sequence[Timings]) -> tuple[Timings, ...]:
    """Return timings with new ones in place of all of the same shape, dtype and weights.

    New ones without layers (the ends of a chain whose layers are stored otherwise) leave layers where they are, and
    ends that were timed with these layers.
    """

    def what(timings: Timings) -> tuple[str, DtypeName, PackedName | None]:
        return timings.profile, timings.dtype, timings.weights

    replaced = {what(timings) for timings in new if timings.decode_seconds_per_layer}
    found = {(*what(timings), timings.path): timings for timings in known if what(timings) not in replaced}
    for timings in sorted(new, key=lambda timings: not timings.decode_seconds_per_layer):
        place = (*what(timings), timings.path)
        found[place] = _beside(found[place], timings) if place in found else timings
    return tuple(sorted(found.values(), key=lambda t: (t.profile, t.dtype, t.path, t.weights or "")))


def _beside(known: Timings, ends: Timings) -> Timings:
    """Return timings with the ends of others; where they hold layers, with those that they lack themselves."""
    names = ("embedding_seconds", "head_seconds")
    has_layers = bool(known.decode_seconds_per_layer)
    taken = (name for name in names if getattr(ends, name) and not (has_layers and getattr(known, name)))
    return known.model_copy(update={name: getattr(ends, name) for name in taken})


def merge_links(known: tuple[Link, ...], new: list[Link]) -> tuple[Link, ...]:
    """Return links with new ones in place of those from and to the same ends."""
    ends = {(link.from_, link.to) for link in new}
    return (*(link for link in known if link.class_ is not None or (link.from_, link.to) not in ends), *new)
