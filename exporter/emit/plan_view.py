"""A plan as other engines see it: hosts with their GPUs in chain order, dtypes and numbers in their spelling."""

import re
from dataclasses import dataclass

from exporter.emit.directory import beside
from plans.cluster import Device
from plans.dtypes import DTYPES
from plans.plan import Plan, Stage

_INDEX = re.compile(r"cuda:(\d{1,4})")
_PORT = re.compile(r"(?<=[^:]):\d{1,5}$|(?<=\]):\d{1,5}$")


@dataclass(frozen=True, slots=True)
class HostPart:
    """The stages of one host, in chain order."""

    name: str
    address: str
    stages: tuple[int, ...]
    gpus: str
    """Value of CUDA_VISIBLE_DEVICES that puts the GPUs in chain order; empty without GPUs."""


@dataclass(frozen=True, slots=True)
class PlanView:
    """What the templates may ask of a plan."""

    plan: Plan
    directory: str
    hosts: tuple[HostPart, ...]
    not_expressed: tuple[str, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers per stage."""
        return self.plan.boundaries

    @property
    def counts(self) -> str:
        """Layers per stage, as most engines write them."""
        return ",".join(map(str, self.layers))

    @property
    def dtype(self) -> str:
        """The weights' dtype as torch spells it."""
        return DTYPES[self.plan.workload.dtype].torch

    @property
    def ggml_kv_type(self) -> str:
        """The KV cache's dtype as llama.cpp spells it."""
        return DTYPES[self.plan.workload.kv_cache_dtype].ggml

    @property
    def ggml_type(self) -> str:
        """The weights' dtype as llama.cpp spells it."""
        return DTYPES[self.plan.workload.dtype].ggml

    @property
    def num_sequences(self) -> int:
        """Sequences that are under way at once."""
        return self.plan.workload.batch_size * self.plan.workload.requests_in_flight

    @property
    def has_gguf(self) -> bool:
        """Whether the plan was made for a GGUF file, so that nothing is to be converted."""
        return self.plan.profile.model.source == "gguf"

    @property
    def gguf(self) -> str:
        """The file that llama.cpp's converter makes of the folder; of a plan for a GGUF file, that file."""
        model = self.plan.profile.model
        if self.has_gguf:
            named = self.directory.endswith(".gguf")
            return self.directory if named else f"{self.directory.rstrip('/')}/{model.shards[0].name}"
        return beside(self.directory, suffix=".gguf")

    @property
    def torch_devices(self) -> tuple[str, ...]:
        """Torch's name of every stage's device on its own host."""
        return tuple(f"cuda:{device}" if isinstance(device, int) else device for device in self.devices())

    def devices(self) -> list[int | str]:
        """Return torch's device of every stage: an index for CUDA, else a name."""
        found = [self.plan.cluster.device(stage.device) for stage in self.plan.stages]
        return [gpu_index(d, self.plan) if d.kind == "cuda" else "cpu" if d.kind == "cpu" else d.kind for d in found]


def hosts_of(plan: Plan) -> tuple[HostPart, ...]:
    """Return the hosts in the order in which the chain first visits them."""
    by_host: dict[str, list[int]] = {}
    for index, stage in enumerate(plan.stages):
        by_host.setdefault(plan.cluster.device(stage.device).host, []).append(index)
    parts = []
    for name, stages in by_host.items():
        devices = [plan.cluster.device(plan.stages[i].device) for i in stages]
        gpus = [str(gpu_index(device, plan)) for device in devices if device.kind == "cuda"]
        address = _PORT.sub("", plan.cluster.host_of(devices[0]).address or name)
        parts.append(HostPart(name, address, tuple(stages), ",".join(gpus)))
    return tuple(parts)


def gpu_index(device: Device, plan: Plan) -> int:
    """Return the CUDA index on its host: from a name such as cuda:1, else its place among the host's GPUs."""
    match = _INDEX.fullmatch(device.name)
    if match:
        return int(match[1])
    return [d.name for d in plan.cluster.devices if d.host == device.host and d.kind == "cuda"].index(device.name)


def runs_on_cpus(plan: Plan, *, engine: str) -> bool:
    """Whether `engine` runs every stage of the plan on a CPU."""
    return engine == "vllm" and all(kind_of(plan, stage) == "cpu" for stage in plan.stages)


def kind_of(plan: Plan, stage: Stage) -> str:
    """Return the kind of a stage's device."""
    return plan.cluster.device(stage.device).kind


def has_head_on_cpu(plan: Plan) -> bool:
    """Whether the last stage is the head alone, on a CPU behind other devices."""
    last = plan.stages[-1]
    return len(plan.stages) > 1 and kind_of(plan, last) == "cpu" and not last.range.num_layers


def packed_layers(plan: Plan) -> frozenset[str]:
    """Return how the layers' matrices are packed, when the plan is exported or already; empty where they are not."""
    return frozenset(layer.weights for layer in plan.profile.layers if layer.weights)


def is_packed(plan: Plan) -> bool:
    """Whether any weights are packed, be it the head's alone."""
    return bool(packed_layers(plan)) or plan.profile.head.weights is not None
