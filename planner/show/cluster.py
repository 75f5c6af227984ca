"""The tables of `llamaplan devices`."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from planner.devices.catalogue import CATALOGUE
from planner.devices.machine import Machine
from planner.show.words import count_text
from planner.timing.topology import Topology
from plans.cluster import Cluster, Device
from plans.commands.console import table
from plans.reading.sizes import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

MAX_LINKED_DEVICES = 8
MESSAGE_BYTES = 1 << 20


def device_table(cluster: Cluster) -> "Table":
    """Return one row per device, with what a plan may use of it."""
    rows = table("device", "host", "kind", numbers=("memory", "budget", "reads", "fp32", "bf16"))
    for device in cluster.devices:
        rows.add_row(*_device_cells(device))
    return rows


def machine_lines(machine: Machine, *, origins: Sequence[str] = ()) -> Iterator[str]:
    """Yield what was found on this machine, and where the rates of its CPU are from."""
    for name, product in machine.products.items():
        yield f"{name}: {product}, {format_bytes(machine.free_bytes[name])} free"
    total = machine.cluster.device("cpu").memory_bytes
    yield (
        f"cpu: {machine.cpu_cores} cores, {format_bytes(machine.free_bytes['cpu'])} of {format_bytes(total)} free"
        + ("" if origins else "; its rates are estimates")
    )
    yield from origins


def timing_lines(cluster: Cluster) -> Iterator[str]:
    """Yield what was measured on each device."""
    for device in cluster.devices:
        for timings in device.timings:
            rows = len(timings.decode_seconds_per_layer) + len(timings.prefill_seconds_per_layer)
            threads = f", {timings.threads} threads" if timings.threads else ""
            stored = timings.weights or timings.dtype
            yield (
                f"{device.name}: {rows} points of layer {timings.profile[:12]} in {stored} measured, "
                f"{timings.path} path{threads}"
            )


def bus_lines(cluster: Cluster) -> Iterator[str]:
    """Yield which CPU devices share a memory bus, and what it carries."""
    for host in cluster.hosts:
        names = [device.name for device in cluster.devices if device.host == host.name and device.kind == "cpu"]
        rate = host.memory_bandwidth_bytes_per_second
        if rate is not None and len(names) > 1:
            yield f"{host.name}: {', '.join(names)} read {rate / 1e9:.1f} GB/s together"


def link_table(cluster: Cluster) -> "Table | None":
    """Return how a message of 1 MiB travels between the devices, or None where that would be no table for people."""
    if not 2 <= len(cluster.devices) <= MAX_LINKED_DEVICES:
        return None
    topology = Topology(cluster)
    rows = table("1 MiB from, to", numbers=[device.name for device in cluster.devices])
    for a in cluster.devices:
        cells = [_hop_text(topology.seconds(a.name, b.name, MESSAGE_BYTES)) for b in cluster.devices]
        rows.add_row(a.name, *cells)
    return rows


def catalogue_table() -> "Table":
    """Return the catalogue of accelerators."""
    rows = table("name", "product", numbers=("GiB", "GB/s", "fp32", "fp16", "bf16 TFLOP/s"))
    for entry in CATALOGUE:
        rates = (entry.fp32_tflops, entry.fp16_tflops, entry.bf16_tflops)
        rows.add_row(
            entry.name,
            entry.title,
            f"{entry.memory_gib:g}",
            f"{entry.bandwidth_gb:g}",
            *("-" if rate is None else f"{rate:g}" for rate in rates),
        )
    return rows


def catalogue_json() -> list[dict[str, object]]:
    """Return the catalogue as plain data."""
    return [
        {
            "name": entry.name,
            "product": entry.title,
            "kind": entry.kind,
            "memory_bytes": entry.memory_bytes,
            "peak_memory_bandwidth_bytes_per_second": entry.bandwidth_gb * 1e9,
            "device": entry.device(entry.name).model_dump(mode="json", by_alias=True),
        }
        for entry in CATALOGUE
    ]


def _device_cells(device: Device) -> tuple[str, ...]:
    rates = device.flops_per_second
    return (
        device.name,
        device.host,
        device.kind,
        format_bytes(device.memory_bytes),
        "" if device.budget_bytes is None else format_bytes(device.budget_bytes),
        count_text(device.memory_bandwidth_bytes_per_second) + "B/s",
        *(count_text(rates[dtype]) + "F/s" if dtype in rates else "-" for dtype in ("fp32", "bf16")),
    )


def _hop_text(seconds: float) -> str:
    if math.isinf(seconds):
        return "no link"
    return "-" if seconds == 0 else f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
