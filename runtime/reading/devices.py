"""Plan device names and torch devices."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from plans.errors import MachineError, UsageError, printable


def torch_device(name: str) -> torch.device:
    """Return the torch device for a plan's device name, checking that this machine has it.

    `cpu#0` and `cpu#1` are two budgets on the one CPU; a host prefix (`box1/cuda:0`) is dropped.

    >>> torch_device("cpu#1")
    device(type='cpu')

    Raises:
        UsageError: torch does not know such a device.
        MachineError: the device is not on this machine; the message lists what is.
    """
    plain = name.rsplit("/", 1)[-1].split("#", 1)[0]
    device = _parse_device(plain)
    if device is None:
        raise UsageError(
            f"{printable(name, limit=64)} is not a device torch knows",
            expected=", ".join(present_devices()),
            hint="map the stage to one of them with --device-map",
            code="E-DEVICE",
        )
    if device.type == "cpu":
        return torch.device("cpu")
    device = torch.device(device.type, device.index or 0)
    if str(device) not in present_devices():
        raise MachineError(
            f"device {name} is not on this machine",
            expected=", ".join(present_devices()),
            hint="map the stage to one of them with --device-map",
            code="E-DEVICE",
        )
    return device


def _parse_device(plain: str) -> torch.device | None:
    try:
        device = torch.device(plain)
    except RuntimeError:
        return None
    # torch keeps the lowest eight bits of a number: its cuda:256 is cuda:0.
    return device if plain in {device.type, str(device)} else None


def planned_device(name: str) -> torch.device:
    """Return the torch device of a plan's device; what a plan names and this machine lacks is no mistake in usage.

    Raises:
        MachineError: there is no such device here; the message lists those that are.
    """
    try:
        return torch_device(name)
    except UsageError as error:
        raise MachineError(error.what, expected=error.expected, hint=error.hint, code=error.code) from None


def present_devices() -> tuple[str, ...]:
    """Return the names of the devices torch can use here, the CPU first."""
    return ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread within: small work need not wait for threads that other programs hold up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait for everything queued on `device`; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
