"""Where a command's cluster comes from: a file, ``--device`` options, or this machine."""

from collections.abc import Sequence
from pathlib import Path

from planner.devices.budgets import parse_margins, with_budgets
from planner.devices.machine import cluster_from_options, this_machine
from plans.cluster import Cluster
from plans.errors import UsageError


def load_cluster(
    path: Path | None = None, *, devices: Sequence[str] | None = None, margins: Sequence[str] | None = None
) -> Cluster:
    """Return the cluster a command is about, with a budget on every device.

    Args:
        path: a cluster file.
        devices: values of ``--device``, see `planner.devices.machine.cluster_from_options`.
        margins: values of ``--margin``, see `planner.devices.budgets.parse_margins`.

    Raises:
        UsageError: both a file and devices are given, or an option is malformed.
        InputError: the file is missing, malformed or contradicts itself.
    """
    leave_free = parse_margins(margins or ())
    if path is not None and devices:
        raise UsageError("--cluster and --device exclude each other", hint="put the devices into the cluster file")
    if path is not None:
        return with_budgets(Cluster.read(path), leave_free)
    if devices:
        return cluster_from_options(devices, margins=leave_free)
    return this_machine(leave_free)


def for_speed(cluster: Cluster, speed: str) -> Cluster:
    """Return the cluster with the curves of the path that will run.

    Args:
        cluster: may hold curves of the fast and of the reference path; a device's fast ones count first.
        speed: as `llamarun --speed`: `reference` leaves only the curves of the reference path.
    """
    if speed != "reference":
        return cluster
    devices = tuple(
        device.model_copy(update={"timings": tuple(t for t in device.timings if t.path == "reference")})
        for device in cluster.devices
    )
    return cluster.model_copy(update={"devices": devices})
