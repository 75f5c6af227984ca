"""Budgets: how much of a device's memory a plan may use.

A budget is what was stated, or free memory minus a margin. The margin pays for what no model of ours counts: other
processes, a desktop, fragmentation, memory a driver never hands out. Measurements published with the Helix system
(ASPLOS 2025) found 18-31 % of nominal memory unusable for weights and cache, different on every device, part of it the
framework's own (which we count as overhead). So the margin is per device or kind, never one global percentage.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from plans.cluster import Cluster, Device
from plans.errors import UsageError, printable
from plans.reading.sizes import format_bytes, parse_bytes

KIND_MARGINS: Mapping[str, Fraction] = {
    "cpu": Fraction(10, 100),  # the operating system's page cache and other programs
    "cuda": Fraction(15, 100),  # allocator fragmentation, display, peer buffers
    "mps": Fraction(25, 100),  # macOS lets the GPU use about three quarters of unified memory
    "xpu": Fraction(15, 100),
    "other": Fraction(20, 100),
}
"""Share of the memory that stays free, by kind of device."""
KIB = 1024
_PERCENT = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class Margin:
    """Memory to leave free: a share of the device's memory, or bytes."""

    share: Fraction | None = None
    num_bytes: int = 0

    def of(self, device: Device) -> int:
        """Return the bytes to leave free on `device`."""
        return self.num_bytes if self.share is None else math.ceil(device.memory_bytes * self.share)


@dataclass(frozen=True, slots=True)
class Margins:
    """Margins by device name or kind, and one for all others; `KIND_MARGINS` where nothing is said."""

    default: Margin | None = None
    by_name: Mapping[str, Margin] = field(default_factory=dict)

    def bytes_for(self, device: Device) -> int:
        """Return the bytes to leave free on `device`: by its name, its kind, the default, the default of its kind."""
        margin = self.by_name.get(device.name) or self.by_name.get(device.kind) or self.default
        return (margin or Margin(KIND_MARGINS[device.kind])).of(device)


def parse_margins(options: Sequence[str]) -> Margins:
    """Read ``10%``, ``2GiB``, ``cuda:0=2GiB`` or ``cuda=15%``; a later option wins.

    Raises:
        UsageError: not a share below 100 % or a size.
    """
    default: Margin | None = None
    by_name: dict[str, Margin] = {}
    for option in options:
        name, separator, amount = option.rpartition("=")
        if separator:
            by_name[name] = _parse_margin(amount)
        else:
            default = _parse_margin(amount)
    return Margins(default, by_name)


def with_budgets(
    cluster: Cluster, margins: Margins | None = None, *, free_bytes: Mapping[str, int] | None = None
) -> Cluster:
    """Return the cluster with a budget on every device.

    Args:
        cluster: devices with a stated budget keep it.
        margins: what to leave free; `KIND_MARGINS` if not given.
        free_bytes: measured free memory by device name; all of its memory for others.

    Raises:
        UsageError: a margin names no device and no kind of the cluster, or leaves nothing of a device.
    """
    margins = margins or Margins()
    _check_names(cluster, margins)
    free = free_bytes or {}
    devices = tuple(
        device
        if device.budget_bytes is not None
        else device.model_copy(update={"budget_bytes": _budget(cluster, device, margins, free)})
        for device in cluster.devices
    )
    return cluster.model_copy(update={"devices": devices})


def _budget(cluster: Cluster, device: Device, margins: Margins, free: Mapping[str, int]) -> int:
    margin = margins.bytes_for(device)
    memory = min(free.get(device.name, device.memory_bytes), device.memory_bytes)
    host_memory = cluster.host_of(device).memory_bytes
    available = memory - margin
    if device.kind == "cpu" and host_memory is not None:
        pool = min(free.get(device.name, host_memory), host_memory) - margin
        available = min(available, _share_of_host(cluster, device, pool))
    if available <= 0:
        raise UsageError(
            f"a margin of {format_bytes(margin)} leaves nothing of the {format_bytes(memory)} on {device.name}",
            hint="lower --margin or leave the device out",
        )
    return available


def _share_of_host(cluster: Cluster, device: Device, pool: int) -> int:
    """CPU devices of a host share its memory: those without a stated budget divide what is left evenly."""
    siblings = [d for d in cluster.devices if d.host == device.host and d.kind == "cpu"]
    stated = sum(d.budget_bytes or 0 for d in siblings)
    return (pool - stated) // sum(d.budget_bytes is None for d in siblings)


def _check_names(cluster: Cluster, margins: Margins) -> None:
    known = {device.name for device in cluster.devices} | set(KIND_MARGINS)
    for name in margins.by_name:
        if name not in known:
            raise UsageError(
                f"--margin names '{printable(name, limit=64)}', which is no device here",
                expected="one of " + ", ".join(sorted(known)),
            )


def _parse_margin(text: str) -> Margin:
    if not text.endswith("%"):
        size = parse_bytes(text)
        if 0 < size < KIB and text[-1].isdigit():  # who writes 10 means neither bytes nor, for certain, percent
            raise UsageError(f"--margin {printable(text, limit=40)} is {size} bytes", expected="a unit: 10%, 2GiB")
        return Margin(None, size)
    # Not whatever Fraction takes: a power of ten as long as a line would be computed digit by digit.
    share = Fraction(text[:-1]) / 100 if _PERCENT.fullmatch(text[:-1]) else None
    if share is None or share >= 1:
        raise UsageError(f"'{printable(text, limit=40)}' is not a margin", expected="a size, or 0% to below 100%")
    return Margin(share)
