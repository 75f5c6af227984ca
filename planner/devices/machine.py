"""This machine, or a list of devices typed by a person, -> a cluster.

Only memory is measured here (psutil; NVML where there is a driver). Rates are estimates from what the hardware is: see
`CPU_CORE`, `CPU_BANDWIDTH_LIMIT` and the catalogue; `llamaplan devices --measure` replaces them by measured curves.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from planner.devices.budgets import Margins, parse_margins, with_budgets
from planner.devices.catalogue import (
    FIXED_OVERHEAD_BYTES,
    UNIT_OVERHEAD_SECONDS,
    Accelerator,
    find_accelerator,
    recognise,
)
from planner.devices.nvml import CudaDevice, cuda_devices
from plans.cluster import Cluster, Device, Host
from plans.commands.machine_memory import memory_bytes
from plans.dtypes import DtypeName
from plans.errors import UsageError, printable
from plans.reading.sizes import format_bytes, parse_bytes

HOST = "local"
PROCESS_OVERHEAD_BYTES = 330 << 20
"""Resident memory of a Python process with torch and transformers loaded, before any weights."""
CPU_BANDWIDTH_PER_CORE = 9e9
CPU_BANDWIDTH_LIMIT = 36e9
"""Bytes per second: torch's linear layers read 17-19 GB/s of bf16 weights on two cores (measured), and two channels of
desktop memory give about 36 of their nominal 51 GB/s."""
CPU_FLOPS_PER_CORE: dict[DtypeName, float] = {"fp32": 40e9, "bf16": 30e9, "fp16": 10e9}
"""Matrix products on one core with 256-bit vectors at 3 GHz: half of the peak 96 GFLOP/s in fp32; half-width dtypes are
converted on the fly, fp16 slowly."""
GENERIC_CUDA = Accelerator("cuda", "unknown CUDA device", "cuda", 8, 300, 10, 30, 30)
"""What is assumed of a CUDA device that is neither here nor in the catalogue."""

_OPTION = re.compile(r"(?:([0-9]{1,3})x)?([A-Za-z0-9][A-Za-z0-9_.:#/-]{0,63}?)(?:=(.+))?")
_CUDA = re.compile(r"cuda(?::([0-9]{1,3}))?")


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine as a cluster without budgets, and what is free on it now."""

    cluster: Cluster
    free_bytes: dict[str, int]
    cpu_cores: int
    products: dict[str, str]
    """Product names of its accelerators, by device name."""


def inspect_machine() -> Machine:
    """Look at this machine: its processor, and CUDA devices where NVML is there. Never fails for want of a driver."""
    gpus = cuda_devices()
    cores = usable_cores()
    total, free = memory_bytes()
    devices = (*(_cuda_device(gpu) for gpu in gpus), _cpu_device("cpu", cores, total))
    host = Host(name=HOST, memory_bytes=total, process_overhead_bytes=PROCESS_OVERHEAD_BYTES)
    return Machine(
        Cluster(hosts=(host,), devices=devices),
        {f"cuda:{gpu.index}": gpu.free_bytes for gpu in gpus} | {"cpu": free},
        cores,
        {f"cuda:{gpu.index}": gpu.product for gpu in gpus},
    )


def this_machine(margins: Margins | None = None) -> Cluster:
    """Return this machine with budgets: what is free now, minus the margins.

    Raises:
        UsageError: a margin leaves nothing of a device, or names none.
    """
    machine = inspect_machine()
    return with_budgets(machine.cluster, margins, free_bytes=machine.free_bytes)


def cluster_from_options(options: Sequence[str], *, margins: Margins | None = None) -> Cluster:
    """Return the cluster that repeated ``--device`` options describe, in their order, on one host.

    ``NAME``, ``NAME=SIZE`` or ``COUNTxNAME=SIZE``; NAME is `cpu`, `cuda:N` or an entry of the catalogue. Repeated names
    are numbered: two times ``cpu=4GiB`` gives ``cpu#0`` and ``cpu#1``.

    Raises:
        UsageError: unknown name, malformed size, or a `cuda:N` given twice.
    """
    machine = inspect_machine()
    parsed = [_parse_option(option) for option in options]
    wanted = [(name, budget) for count, name, budget in parsed for _ in range(count)]
    names = _number([name for name, _budget in wanted])
    devices = tuple(
        _named_device(name, label, budget, machine) for (name, budget), label in zip(wanted, names, strict=True)
    )
    free = {label: machine.free_bytes[name] for (name, _b), label in zip(wanted, names, strict=True)
            if name in machine.free_bytes}  # fmt: skip
    host = machine.cluster.hosts[0]
    stated = sum(d.budget_bytes or 0 for d in devices if d.kind == "cpu")
    if host.memory_bytes is not None and stated > host.memory_bytes:
        # planning for a larger machine than this one; loading checks real memory again
        host = host.model_copy(update={"memory_bytes": None})
    return with_budgets(Cluster(hosts=(host,), devices=devices), margins, free_bytes=free)


def oversized_budgets(options: Sequence[str]) -> tuple[str, ...]:
    """Return a sentence for every ``--device`` option that states more memory than the device is known to have."""
    machine = inspect_machine()
    parsed = [_parse_option(option) for option in options]
    found = [
        f"--device {name}={format_bytes(budget)} is more than the {format_bytes(memory)} of one {name}"
        for _, name, budget in parsed
        if budget is not None and name != "cpu" and (memory := _known_memory(name, machine)) and budget > memory
    ]
    stated = sum(count * (budget or 0) for count, name, budget in parsed if name == "cpu")
    total = machine.cluster.hosts[0].memory_bytes or stated
    if stated > total:
        found.append(
            f"--device cpu={format_bytes(stated)} in all is more than the {format_bytes(total)} of this machine"
        )
    return tuple(f"{text}; it is planned as if it had as much" for text in found)


def _known_memory(name: str, machine: Machine) -> int | None:
    here = {device.name: device.memory_bytes for device in machine.cluster.devices}
    entry = find_accelerator(name)
    return here.get(name, entry.memory_bytes if entry is not None else None)


def usable_cores() -> int:
    """Return the physical cores this process may run on (affinity and hyper-threading considered)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def _cpu_device(name: str, cores: int, memory: int, budget: int | None = None) -> Device:
    return Device(
        name=name,
        host=HOST,
        kind="cpu",
        memory_bytes=max(memory, budget or 0),
        budget_bytes=budget,
        memory_bandwidth_bytes_per_second=min(CPU_BANDWIDTH_PER_CORE * cores, CPU_BANDWIDTH_LIMIT),
        flops_per_second={dtype: rate * cores for dtype, rate in CPU_FLOPS_PER_CORE.items()},
        unit_overhead_seconds=UNIT_OVERHEAD_SECONDS["cpu"],
    )


def _cuda_device(gpu: CudaDevice) -> Device:
    known = recognise(gpu.product, memory_bytes=gpu.memory_bytes)
    device = (known or GENERIC_CUDA).device(f"cuda:{gpu.index}", host=HOST)
    update: dict[str, object] = {"memory_bytes": gpu.memory_bytes, "fixed_overhead_bytes": FIXED_OVERHEAD_BYTES["cuda"]}
    if known is None and gpu.bandwidth_bytes_per_second:
        update["memory_bandwidth_bytes_per_second"] = gpu.bandwidth_bytes_per_second
    return device.model_copy(update=update)


def _parse_option(text: str) -> tuple[int, str, int | None]:
    match = _OPTION.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--device '{printable(text, limit=60)}' is not NAME, NAME=SIZE or COUNTxNAME=SIZE",
            expected="for example cuda:0=20GiB, cpu=16GiB or 2xrtx4090",
        )
    count, name, size = match.groups()
    if count is not None and not 1 <= int(count) <= 256:
        raise UsageError(f"--device asks for {count} devices", expected="1 to 256")
    budget = parse_bytes(size) if size is not None else None
    if budget == 0:
        raise UsageError(f"--device '{printable(text, limit=60)}' offers no memory", expected="a size above 0")
    return int(count or 1), "cuda:0" if name == "cuda" else name, budget


def _number(names: Sequence[str]) -> list[str]:
    """Give repeated names a number each: cpu, cpu -> cpu#0, cpu#1."""
    counts, seen, result = Counter(names), Counter[str](), []
    for name in names:
        if counts[name] > 1 and _CUDA.fullmatch(name):
            raise UsageError(f"--device {name} is given {counts[name]} times", hint="it is one device; name others")
        result.append(f"{name}#{seen[name]}" if counts[name] > 1 else name)
        seen[name] += 1
    return result


def _named_device(name: str, label: str, budget: int | None, machine: Machine) -> Device:
    if name == "cpu":
        total, _free = memory_bytes()
        return _cpu_device(label, machine.cpu_cores, total, budget)
    present = {device.name: device for device in machine.cluster.devices}
    here = present.get(name)
    if here is not None:
        memory = max(here.memory_bytes, budget or 0)
        return here.model_copy(update={"name": label, "budget_bytes": budget, "memory_bytes": memory})
    entry = GENERIC_CUDA if _CUDA.fullmatch(name) else find_accelerator(name)
    if entry is None or (entry is GENERIC_CUDA and budget is None):
        raise UsageError(
            f"--device {printable(name, limit=64)} is not on this machine"
            + ("" if entry is None else " and has no size"),
            expected=f"{', '.join(present)}, any cuda:N=SIZE, or a name from 'llamaplan devices --catalogue'",
        )
    return entry.device(label, host=HOST, budget_bytes=budget)


__all__ = [
    "Machine",
    "cluster_from_options",
    "inspect_machine",
    "parse_margins",
    "this_machine",
    "with_budgets",
]
