"""What is known of this machine without measuring again: the look at it, and what `devices --measure` found here.

Both lie in the user's cache folder, one small file each, with the machine they hold for and the day they are from.
A file that is damaged, of another machine or of somebody else counts as none. Only devices of this machine are
concerned: a cluster file, or a device named from the catalogue, is planned for as it is described.
"""

import datetime
import hashlib
import os
import platform
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from planner.devices.clusters import for_speed
from planner.devices.machine import usable_cores
from planner.measure.cluster import CPU, MeasuredCluster, merge_links, plain_name, read_rates, replace_timings
from planner.measure.processor.look import Look, look_in_a_process
from plans.cluster import Cluster, Device, Link, Name, Timings
from plans.commands.user_cache import keep, recall
from plans.dtypes import DtypeName
from plans.profile import ModelProfile, PackedName
from plans.reading.sizes import ByteSize
from plans.reading.strict import SchemaVersion, StrictModel

FAST_READ_SHARE, FAST_UNIT_SECONDS = 0.93, 30e-6
"""Native kernels read weights at this share of what the look read, and lose so much per layer; 1.1B and 135M, bf16,
batch 1, two cores: 67.8 and 10.8 ms per token at 32.5 and 28.1 GB/s (2026-11-29)."""
REFERENCE_READ_SHARE, REFERENCE_UNIT_SECONDS = 0.5, 400e-6
"""The same of transformers' own layers: 154 and 32 ms (2026-11-23 and 29)."""
PROMPT_SHARE = 0.9
"""Prompts reach this share of the rate of one large product."""

DISTURBED = "other programs were busy while this machine was looked at: its rates may be too low, and are not kept"


class Fingerprint(StrictModel):
    """The machine that numbers hold for; any difference makes them another machine's."""

    processor: str
    cores: int
    threads: str
    memory_bytes: int
    versions: tuple[str, ...]


class KeptLook(StrictModel):
    """A look on disk."""

    schema_version: SchemaVersion = 1
    machine: Fingerprint
    day: str
    look: Look


class KeptDevice(StrictModel):
    """What was measured on one device, by the name it has on its own machine."""

    name: Name
    timings: tuple[Timings, ...]
    fixed_overhead_bytes: ByteSize


class KeptMeasurement(StrictModel):
    """What `devices --measure` found for one layer shape and dtype."""

    schema_version: SchemaVersion = 1
    machine: Fingerprint
    day: str
    shape: str
    dtype: DtypeName
    process_overhead_bytes: ByteSize
    devices: tuple[KeptDevice, ...]
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """A cluster with what is known of this machine, and in words where that is from."""

    cluster: Cluster
    origins: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def fingerprint() -> Fingerprint:
    """Describe this machine: what a look or a measurement depends on."""
    return Fingerprint(
        processor=_processor(),
        cores=usable_cores(),
        threads=os.environ.get("OMP_NUM_THREADS", ""),
        memory_bytes=psutil.virtual_memory().total,
        versions=tuple(f"{name} {_version(name)}" for name in ("llamaplan", "torch", "transformers")),
    )


def with_known(
    cluster: Cluster,
    *,
    profile: ModelProfile | None = None,
    widths: Collection[PackedName | None] = (),
    speed: str = "auto",
) -> Known:
    """Return the cluster with the rates and curves that are known of this machine; looks at it if nobody has yet.

    Args:
        cluster: devices of this machine, and perhaps some of the catalogue; never a cluster file's.
        profile: the model to plan for: measured curves of its layers and dtype count before the look.
        widths: how its layers may be stored besides; the look says what is not measured.
        speed: as `planner.devices.clusters.for_speed`; which path's share of the machine's rates is reached.
    """
    machine = fingerprint()
    origins: tuple[str, ...] = ()
    kept = None if profile is None else _recall_measurement(machine, profile)
    here = {plain_name(device.name) for device in cluster.devices}
    measured = sorted(here & set(_names(kept))) if kept is not None else []
    wanted = set(widths) | ({layer.weights for layer in profile.layers} if profile is not None else set())
    is_timed = False
    if kept is not None and measured:
        cluster = _with_measurement(cluster, kept)
        timed = _timed_widths(kept)
        is_timed = CPU in measured and wanted <= timed
        what = ", ".join(measured) + (f" ({', '.join(_width_names(timed, kept))})" if timed != {None} else "")
        origins = (f"times of {what}: measured here on {kept.day}; --no-probe plans without",)
    if CPU not in here:
        return Known(cluster, origins)
    seen = Known(cluster) if is_timed else _with_look(cluster, machine, speed)
    rate = _measured_read_rate(cluster, profile, speed) if CPU in measured and profile is not None else None
    counted = seen.cluster if rate is None else _with_bus(seen.cluster, rate)
    return replace(seen, cluster=counted, origins=(*origins, *seen.origins))


def remember_measurement(found: MeasuredCluster, profile: ModelProfile) -> bool:
    """Keep what was measured on this machine for `profile`'s shape; return whether that was possible."""
    devices = {plain_name(name): found.cluster.device(name) for name in reversed(found.measured)}
    host = found.cluster.host_of(next(iter(devices.values())))
    machine, shape = fingerprint(), profile.layers[0].shapes_sha256
    before = _recall_measurement(machine, profile)
    timed = {device.name: device.timings for device in before.devices} if before is not None else {}
    kept = KeptMeasurement(
        machine=machine,
        day=_today(),
        shape=shape,
        dtype=profile.dtype,
        process_overhead_bytes=host.process_overhead_bytes,
        devices=tuple(
            _kept_device(name, device, profile, before=timed.get(name, ())) for name, device in sorted(devices.items())
        ),
        links=tuple(_plain_links(found)),
    )
    return keep(_measurement_name(machine, shape, profile.dtype), kept)


def _kept_device(name: str, device: Device, profile: ModelProfile, *, before: tuple[Timings, ...]) -> KeptDevice:
    """What was measured now, and in other widths before."""
    shapes = {layer.shapes_sha256 for layer in profile.layers}
    timings = tuple(t for t in device.timings if t.profile in shapes and t.dtype == profile.dtype)
    return KeptDevice(
        name=name, timings=replace_timings(before, timings), fixed_overhead_bytes=device.fixed_overhead_bytes
    )


def _timed_widths(kept: KeptMeasurement) -> set[PackedName | None]:
    """Return how the layers were stored whose times are known of this machine's CPU."""
    timings = [t for device in kept.devices if device.name == CPU for t in device.timings]
    return {t.weights for t in timings if t.decode_seconds_per_layer}


def _width_names(widths: Collection[PackedName | None], kept: KeptMeasurement) -> list[str]:
    """Return widths in words, the widest first."""
    return [width or kept.dtype for width in (None, "int8", "int4") if width in widths]


def _plain_links(found: MeasuredCluster) -> Iterator[Link]:
    """Yield the measured links under the names devices have on their own machine, one of each pair."""
    seen = set()
    for link in found.cluster.links:
        if link.from_ in found.measured and link.to in found.measured:
            ends = plain_name(link.from_), plain_name(link.to)
            if ends not in seen and ends[0] != ends[1]:
                seen.add(ends)
                yield link.model_copy(update={"from_": ends[0], "to": ends[1]})


def _recall_measurement(machine: Fingerprint, profile: ModelProfile) -> KeptMeasurement | None:
    shape = profile.layers[0].shapes_sha256
    kept = recall(KeptMeasurement, _measurement_name(machine, shape, profile.dtype))
    is_ours = kept is not None and (kept.machine, kept.shape, kept.dtype) == (machine, shape, profile.dtype)
    return kept if is_ours else None


def _names(kept: KeptMeasurement) -> tuple[str, ...]:
    return tuple(device.name for device in kept.devices)


def _with_measurement(cluster: Cluster, kept: KeptMeasurement) -> Cluster:
    known = {device.name: device for device in kept.devices}
    devices = tuple(
        device if plain_name(device.name) not in known else _measured_device(device, known[plain_name(device.name)])
        for device in cluster.devices
    )
    hosts = tuple(host.model_copy(update={"process_overhead_bytes": kept.process_overhead_bytes})
                  for host in cluster.hosts)  # fmt: skip
    links = [
        link.model_copy(update={"from_": a.name, "to": b.name})
        for link in kept.links
        for a in devices
        for b in devices
        if (plain_name(a.name), plain_name(b.name)) == (link.from_, link.to)
    ]
    return cluster.model_copy(update={"hosts": hosts, "devices": devices, "links": merge_links(cluster.links, links)})


def _measured_device(device: Device, kept: KeptDevice) -> Device:
    timings = replace_timings(device.timings, list(kept.timings))
    return device.model_copy(update={"timings": timings, "fixed_overhead_bytes": kept.fixed_overhead_bytes})


def _with_look(cluster: Cluster, machine: Fingerprint, speed: str) -> Known:
    kept = recall(KeptLook, _look_name(machine))
    if kept is None or kept.machine != machine:
        found = look_in_a_process()
        if found is None:
            return Known(cluster, (), ("this machine could not be looked at; the rates of its CPU are estimates",))
        kept = KeptLook(machine=machine, day=_today(), look=found)
        if found.is_disturbed:
            return Known(_seen(cluster, found, speed), (_look_line(kept),), (DISTURBED,))
        keep(_look_name(machine), kept)
    return Known(_seen(cluster, kept.look, speed), (_look_line(kept),))


def _measured_read_rate(cluster: Cluster, profile: ModelProfile, speed: str) -> float | None:
    """Return the bytes per second at which decode steps of one sequence read layers, on the path that will run."""
    known = next(d.timings for d in for_speed(cluster, speed).devices if plain_name(d.name) == CPU)
    layer = profile.layers[0]
    timings = [t for t in known if (t.profile, t.weights) == (layer.shapes_sha256, layer.weights)]
    timings = [t for t in timings if t.decode_seconds_per_layer]
    counted = min(timings, key=lambda t: t.path == "reference", default=None)
    return None if counted is None else max(read_rates(counted, profile), default=None)


def _with_bus(cluster: Cluster, bytes_per_second: float | None) -> Cluster:
    """Say what this machine's CPU devices read together, where there are several: they share one memory bus."""
    hosts = [device.host for device in cluster.devices if plain_name(device.name) == CPU]
    if len(hosts) < 2:
        return cluster
    update = {"memory_bandwidth_bytes_per_second": bytes_per_second}
    changed = (host.model_copy(update=update) if host.name in hosts else host for host in cluster.hosts)
    return cluster.model_copy(update={"hosts": tuple(changed)})


def _seen(cluster: Cluster, look: Look, speed: str) -> Cluster:
    devices = tuple(
        _seen_device(device, look, is_fast=speed != "reference" and look.has_compiler)
        if plain_name(device.name) == CPU
        else device
        for device in cluster.devices
    )
    seen = cluster.model_copy(update={"devices": devices})
    return _with_bus(seen, next(d for d in devices if plain_name(d.name) == CPU).memory_bandwidth_bytes_per_second)


def _seen_device(device: Device, look: Look, *, is_fast: bool) -> Device:
    """Native kernels compute in fp32 whatever the weights are in, unless the processor multiplies those faster."""
    rates = look.flops_per_second
    least = rates.get("fp32", 0.0) if is_fast else 0.0
    share, overhead = (
        (FAST_READ_SHARE, FAST_UNIT_SECONDS) if is_fast else (REFERENCE_READ_SHARE, REFERENCE_UNIT_SECONDS)
    )
    return device.model_copy(
        update={
            "memory_bandwidth_bytes_per_second": share * look.read_bytes_per_second,
            "flops_per_second": {dtype: PROMPT_SHARE * max(rate, least) for dtype, rate in rates.items()},
            "unit_overhead_seconds": overhead,
        }
    )


def _look_line(kept: KeptLook) -> str:
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in sorted(kept.look.flops_per_second.items()))
    return (
        f"rates of cpu: seen here on {kept.day} with {kept.look.threads} threads: reads "
        f"{kept.look.read_bytes_per_second / 1e9:.1f} GB/s, multiplies at {rates} GFLOP/s; --no-probe plans without"
    )


def _look_name(machine: Fingerprint) -> str:
    return f"look-{_digest(machine.to_json())}.json"


def _measurement_name(machine: Fingerprint, shape: str, dtype: str) -> str:
    return f"measured-{_digest(machine.to_json() + shape + dtype)}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = sorted({line.partition(":")[2].strip() for line in lines if line.startswith("model name")})
    return " ".join([platform.machine(), *models])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
