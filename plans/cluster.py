"""The cluster: hosts, the devices on them, and the links between them.

Sizes may be written as ``"20GiB"`` and are kept as bytes. A device's budget is what a plan may use of it; without
`budget_bytes` it is what `planner` derives from its memory and margin, and every plan states the result.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from plans.dtypes import DtypeName
from plans.profile import Count, PackedName
from plans.reading.sizes import ByteSize
from plans.reading.strict import SchemaVersion, StrictModel

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:#/-]{0,63}$")]
Rate = Annotated[float, Field(gt=0, le=1e18)]
Seconds = Annotated[float, Field(ge=0, le=1e6)]
DeviceKind = Literal["cpu", "cuda", "mps", "xpu", "other"]
LinkClass = Literal["same_host", "between_hosts"]
MAX_SPEED_RATIO = 1e9
MAX_DEVICES = 4096

_ADDRESS = re.compile(
    r"(?:\[[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9_.-]{1,15})?\]|[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?)(?::([0-9]{1,6}))?"
)


class Host(StrictModel):
    """A machine. A host without devices is a switch: traffic may pass through it."""

    name: Name
    address: str | None = None
    """Host name, IPv4 or [IPv6], with an optional :port."""
    memory_bytes: ByteSize | None = None
    process_overhead_bytes: ByteSize = 0
    """Resident memory of one process before any weights are loaded."""
    memory_bandwidth_bytes_per_second: Rate | None = None
    """What all its CPU devices read together, as they share one memory bus; unset: nothing is known of that."""

    @model_serializer(mode="wrap")
    def _without_unset_bandwidth(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        values: dict[str, object] = handler(self)
        if self.memory_bandwidth_bytes_per_second is None:
            values.pop("memory_bandwidth_bytes_per_second", None)  # files of before stay as they were
        return values

    @field_validator("address")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        match = _ADDRESS.fullmatch(value) if value is not None else None
        if value is not None and match is None:
            raise ValueError("is not a host name, an IPv4 address or a bracketed IPv6 address")
        if match and match.group(1) and not 1 <= int(match.group(1)) <= 65535:
            raise ValueError(f"port {match.group(1)} is not between 1 and 65535")
        return value


class Timings(StrictModel):
    """Measured curves of one device for one model profile."""

    profile: Annotated[str, Field(pattern=r"^(\*|[0-9a-f]{64})$")]
    """The layer shape they were measured on (`shapes_sha256` of a layer), or "*" for any."""
    dtype: DtypeName
    weights: PackedName | None = None
    """How the matrices of these layers, and of this head, are stored; absent for those of `dtype` itself."""
    path: Literal["reference", "fast"] = "reference"
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """CPU threads used; 0 where that has no meaning."""
    decode_seconds_per_layer: tuple[tuple[Count, Count, Seconds], ...] = ()
    """Rows (context, batch, seconds)."""
    prefill_seconds_per_layer: tuple[tuple[Count, Count, Count, Seconds], ...] = ()
    """Rows (tokens, past tokens, batch, seconds)."""
    embedding_seconds: tuple[tuple[Count, Seconds], ...] = ()
    """Rows (batch, seconds)."""
    head_seconds: tuple[tuple[Count, Seconds], ...] = ()
    """Rows (batch, seconds)."""

    @model_serializer(mode="wrap")
    def _without_unset_weights(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        written: dict[str, object] = write(self)
        return written if self.weights is not None else {k: v for k, v in written.items() if k != "weights"}


class Device(StrictModel):
    """Something that holds weights and computes."""

    name: Name
    host: Name = "local"
    kind: DeviceKind
    memory_bytes: Annotated[ByteSize, Field(gt=0)]
    budget_bytes: ByteSize | None = None
    """What a plan may use; null lets the planner take memory minus a margin."""
    fixed_overhead_bytes: ByteSize = 0
    """Framework context and allocator slack, before any weights."""
    memory_bandwidth_bytes_per_second: Rate
    flops_per_second: Mapping[DtypeName, Rate]
    unit_overhead_seconds: Seconds = 0.0
    """Fixed cost of running one unit once (kernel launches, Python)."""
    timings: tuple[Timings, ...] = ()

    @model_validator(mode="after")
    def _budget_within_memory(self) -> "Device":
        if self.budget_bytes is not None and self.budget_bytes > self.memory_bytes:
            raise ValueError(f"budget_bytes {self.budget_bytes} exceed memory_bytes {self.memory_bytes}")
        if not self.flops_per_second:
            raise ValueError("flops_per_second names no dtype")
        return self


class Link(StrictModel):
    """A path between two devices or hosts, or the default for a class of pairs; both ways unless reversed."""

    from_: Name | None = Field(default=None, alias="from")
    to: Name | None = None
    class_: LinkClass | None = Field(default=None, alias="class")
    bandwidth_bytes_per_second: Rate
    latency_seconds: Seconds

    @model_validator(mode="after")
    def _pair_or_class(self) -> "Link":
        is_pair = self.from_ is not None and self.to is not None
        if is_pair == (self.class_ is not None) or (self.from_ is None) != (self.to is None):
            raise ValueError("give either from and to, or class")
        if is_pair and self.from_ == self.to:
            raise ValueError(f"a link from {self.from_} to itself")
        return self


class Cluster(StrictModel):
    """Everything a plan may use."""

    schema_version: SchemaVersion = 1
    hosts: tuple[Host, ...] = ()
    devices: Annotated[tuple[Device, ...], Field(min_length=1, max_length=MAX_DEVICES)]
    links: tuple[Link, ...] = ()

    @model_validator(mode="after")
    def _names_fit_together(self) -> "Cluster":
        _refuse_twins("device", (device.name for device in self.devices))
        _refuse_twins("host", (host.name for host in self.hosts))
        hosts = {host.name for host in self.hosts} or {device.host for device in self.devices}
        for device in self.devices:
            if device.host not in hosts:
                raise ValueError(f"device {device.name} is on host {device.host}, which is not listed")
        if hosts & {device.name for device in self.devices}:
            raise ValueError("a device and a host share a name")
        ends = hosts | {device.name for device in self.devices}
        for link in self.links:
            for end in (link.from_, link.to):
                if end is not None and end not in ends:
                    raise ValueError(f"a link names {end}, which is neither a device nor a host")
        _refuse_twins("link", (f"{link.from_} -> {link.to} {link.class_ or ''}" for link in self.links))
        return self

    @model_validator(mode="after")
    def _speeds_are_comparable(self) -> "Cluster":
        speeds = {
            "memory bandwidths": [device.memory_bandwidth_bytes_per_second for device in self.devices],
            "compute rates": [rate for device in self.devices for rate in device.flops_per_second.values()],
            "link bandwidths": [link.bandwidth_bytes_per_second for link in self.links],
        }
        for what, values in speeds.items():
            if values and max(values) > MAX_SPEED_RATIO * min(values):
                raise ValueError(f"{what} differ by more than {MAX_SPEED_RATIO:.0e}: {min(values)}, {max(values)}")
        return self

    @model_validator(mode="after")
    def _host_memory_is_shared(self) -> "Cluster":
        for host in self.hosts:
            budgets = [d.budget_bytes or 0 for d in self.devices if d.host == host.name and d.kind == "cpu"]
            if host.memory_bytes is not None and sum(budgets) > host.memory_bytes:
                raise ValueError(
                    f"the CPU devices of host {host.name} share its {host.memory_bytes} bytes, "
                    f"their budgets sum to {sum(budgets)}"
                )
        return self

    def device(self, name: str) -> Device:
        """Return the device called `name`; KeyError if there is none."""
        for device in self.devices:
            if device.name == name:
                return device
        raise KeyError(name)

    def host_of(self, device: Device) -> Host:
        """Return the host of `device`, an anonymous one if hosts are not listed."""
        return next((host for host in self.hosts if host.name == device.host), Host(name=device.host))


def _refuse_twins(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"two {what}s are called {name.strip()}")
        seen.add(name)
