"""How other engines would cut a model over a cluster: vLLM, SGLang, TensorRT-LLM, accelerate, exo, llama.cpp.

Every rule takes the devices in the cluster's order and knows nothing of links, speeds or the KV cache. Engines that
place layers on accelerators only are given the accelerators; a cluster without any lends them its CPU devices. "Memory"
is the budget of a device, as everywhere in a plan.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from planner.rivals import accelerate as rules_accelerate
from planner.rivals.accelerate import DISK, Room, Sizes
from plans.cluster import Cluster, Device
from plans.dtypes import DTYPES
from plans.engines import rules as rules_counts
from plans.errors import UsageError, printable
from plans.profile import ModelProfile
from plans.reading.sizes import parse_count
from plans.stages import StageRange

ROTARY_BYTES = 4
"""transformers keeps its rotary frequencies in fp32."""


@dataclass(frozen=True, slots=True)
class Split:
    """What an engine makes of a model and a cluster: a chain of stages, or the reason why there is none."""

    engine: str
    stages: tuple[StageRange, ...] = ()
    reason: str = ""
    note: str = ""
    """What the engine would do differently from a chain of stages that compute where they lie."""


def all_splits(profile: ModelProfile, *, cluster: Cluster) -> tuple[Split, ...]:
    """Return what each rule of `RULES` makes of a model and a cluster whose devices have budgets."""
    return tuple(rule(profile, cluster) for rule in RULES.values())


def accelerators(cluster: Cluster) -> tuple[Device, ...]:
    """Return the devices that are no CPU, or all of them if there are only CPUs."""
    return tuple(d for d in cluster.devices if d.kind != "cpu") or cluster.devices


def vllm(profile: ModelProfile, cluster: Cluster) -> Split:
    """Cut as vLLM does without VLLM_PP_LAYER_PARTITION."""
    return _equal("vllm", rules_counts.vllm_layers, profile, cluster)


def sglang(profile: ModelProfile, cluster: Cluster) -> Split:
    """Cut as SGLang does without SGLANG_PP_LAYER_PARTITION."""
    return _equal("sglang", rules_counts.sglang_layers, profile, cluster)


def tensorrt_llm(profile: ModelProfile, cluster: Cluster) -> Split:
    """Cut as TensorRT-LLM does without pp_partition."""
    return _equal("tensorrt-llm", rules_counts.tensorrt_llm_layers, profile, cluster)


def exo(profile: ModelProfile, cluster: Cluster) -> Split:
    """Cut as exo does: in proportion to memory, at least one layer everywhere."""
    memory = [_memory(device) for device in cluster.devices]
    num_layers = profile.model.num_hidden_layers
    if num_layers < len(memory) or not sum(memory):
        return Split("exo", reason=f"exo needs memory, and a layer for each of the {len(memory)} devices")
    return by_counts("exo", rules_counts.exo_layers(num_layers, memory_bytes=memory), cluster.devices)


def llama_cpp(profile: ModelProfile, cluster: Cluster, *, num_gpu_layers: int | None = None) -> Split:
    """Cut as llama.cpp does without --tensor-split: in proportion to free memory.

    Args:
        num_gpu_layers: its -ngl; None for all of them.
    """
    gpus, num_layers = accelerators(cluster), profile.model.num_hidden_layers
    if not any(_memory(device) for device in gpus):
        return Split("llama.cpp", reason="no device offers memory")
    split = [float(_memory(device)) for device in gpus]
    offloaded = num_layers + 1 if num_gpu_layers is None else num_gpu_layers
    owners = rules_counts.llama_cpp_owners(num_layers, split=split, num_gpu_layers=offloaded)
    home = _cpu(cluster)
    if home is None and None in owners:
        return Split("llama.cpp", reason="the cluster lists no CPU for what is not offloaded")
    names = [gpus[owner].name if owner is not None else home.name if home else "" for owner in owners]
    first = home.name if home else names[0]  # the token table always stays on the CPU
    return Split("llama.cpp", chain_of([first, *names]))


def accelerate_auto(profile: ModelProfile, cluster: Cluster) -> Split:
    """Cut as accelerate's infer_auto_device_map does with these memory limits."""
    return _accelerate("accelerate auto", profile, cluster, is_balanced=False)


def accelerate_balanced(profile: ModelProfile, cluster: Cluster) -> Split:
    """Cut as accelerate does after get_balanced_memory."""
    return _accelerate("accelerate balanced", profile, cluster, is_balanced=True)


RULES: Mapping[str, Callable[[ModelProfile, Cluster], Split]] = {
    "vllm": vllm,
    "sglang": sglang,
    "tensorrt-llm": tensorrt_llm,
    "accelerate auto": accelerate_auto,
    "accelerate balanced": accelerate_balanced,
    "exo": exo,
    "llama.cpp": llama_cpp,
}


def chain_of(owners: Sequence[str]) -> tuple[StageRange, ...]:
    """Return the stages for the devices of all units: the embedding, every layer, the head."""
    stages: list[StageRange] = []
    position = 0  # units placed
    last_layer = len(owners) - 2
    for name, group in groupby(owners):
        end = position + len(list(group))
        start_layer, end_layer = max(position - 1, 0), min(end - 1, last_layer)
        stages.append(StageRange(name, start_layer, end_layer, position == 0, end == len(owners)))
        position = end
    return tuple(stages)


def by_counts(engine: str, layers: Sequence[int], devices: Sequence[Device]) -> Split:
    """Return the chain with so many layers per device; the embedding goes with the first, the head with the last."""
    names = [device.name for device in devices[: len(layers)]]
    if not all(layers[1:-1]):
        return Split(engine, reason=f"a rank in the middle gets no layer ({','.join(map(str, layers))})")
    owners = [name for name, count in zip(names, layers, strict=True) for _ in range(count)]
    return Split(engine, chain_of([names[0], *owners, names[-1]]))


def from_partition(
    engine: str,
    ranges: Sequence[tuple[int, int]],
    *,
    cluster: Cluster,
    devices: Sequence[str] | None = None,
    has_cpu_part: bool = False,
) -> Split:
    """Return the chain of a partition that a user gave to an engine.

    Args:
        engine: its name.
        ranges: half-open layer ranges in chain order.
        devices: their devices as the engine names them (``0``, ``cuda:1``, ``cpu``); None: the accelerators in order.
        has_cpu_part: the first range stays on the CPU.

    Raises:
        UsageError: more ranges than devices, or a device the cluster does not have.
    """
    layers = [end - start for start, end in ranges]
    if devices is not None:
        owners = [_device_called(name, cluster) for name in devices]
    else:
        owners = _in_order(engine, len(ranges), cluster, has_cpu_part=has_cpu_part)
    if engine == "llama.cpp":
        home = _cpu(cluster)
        placed = [name for name, count in zip(owners, layers, strict=True) for _ in range(count)]
        return Split(engine, chain_of([home.name if home else owners[0], *placed, owners[-1]]))
    return by_counts(engine, layers, [cluster.device(name) for name in owners])


def _in_order(engine: str, num_ranges: int, cluster: Cluster, *, has_cpu_part: bool) -> list[str]:
    names = [device.name for device in accelerators(cluster)]
    home = _cpu(cluster)
    if has_cpu_part:
        if home is None:
            raise UsageError(f"the partition of {engine} leaves layers on the CPU, the cluster lists none")
        names = [home.name, *(name for name in names if name != home.name)]
    if num_ranges > len(names):
        raise UsageError(f"the partition of {engine} names {num_ranges} ranks, there are {len(names)} devices for them")
    return names[:num_ranges]


def _device_called(name: str, cluster: Cluster) -> str:
    if name in {device.name for device in cluster.devices}:
        return name
    gpus, home = [d for d in cluster.devices if d.kind != "cpu"], _cpu(cluster)
    if name == "cpu" and home is not None:
        return home.name
    index = parse_count(name.removeprefix("cuda:"))
    if index is not None and index < len(gpus):
        return gpus[index].name
    raise UsageError(
        f"the partition names device {printable(name, limit=64)}", expected=", ".join(d.name for d in cluster.devices)
    )


def _equal(engine: str, rule: Callable[..., tuple[int, ...]], profile: ModelProfile, cluster: Cluster) -> Split:
    gpus, num_layers = accelerators(cluster), profile.model.num_hidden_layers
    if len(gpus) > num_layers:
        return Split(engine, reason=f"{num_layers} layers do not go round {len(gpus)} ranks")
    return by_counts(engine, rule(num_layers, num_ranks=len(gpus)), gpus)


def _accelerate(engine: str, profile: ModelProfile, cluster: Cluster, *, is_balanced: bool) -> Split:
    cpus = [device for device in cluster.devices if device.kind == "cpu"]
    if len({device.host for device in cluster.devices}) > 1:
        return Split(engine, reason="accelerate places a model on one host")
    if len(cpus) > 1:
        return Split(engine, reason=f"accelerate knows one CPU, there are {len(cpus)} here")
    sizes, rooms = module_sizes(profile), _rooms(cluster)
    if is_balanced:
        rooms = rules_accelerate.balanced_rooms(sizes, rooms=rooms)
    placed = rules_accelerate.fill(sizes, rooms=rooms)
    on_disk = [name for name, device in placed.items() if device == DISK]
    if on_disk:
        return Split(engine, reason=f"accelerate sends {on_disk[0]} and {len(on_disk) - 1} more modules to the disk")
    layers = [placed[f"layers.{index}"] for index in range(profile.model.num_hidden_layers)]
    note = ""
    if cpus and cpus[0].name in placed.values() and len(cluster.devices) > 1:
        note = "accelerate copies the CPU's part to the first GPU at every step; scored as if the CPU computed it"
    return Split(engine, chain_of([placed["embedding"], *layers, placed["head"]]), note=note)


def module_sizes(profile: ModelProfile) -> Sizes:
    """Return the sizes accelerate would measure, from the profile."""
    model = profile.model
    norm = model.hidden_size * DTYPES[profile.dtype].size_bytes
    return Sizes(
        embedding=profile.embedding.weight_bytes,
        layers=tuple(layer.weight_bytes for layer in profile.layers),
        norm=norm,
        rotary=model.head_dim * ROTARY_BYTES,  # two buffers of half a head each
        head=0 if profile.tied else profile.head.weight_bytes - norm,
        is_tied=profile.tied,
    )


def _rooms(cluster: Cluster) -> tuple[Room, ...]:
    gpus = [device for device in cluster.devices if device.kind != "cpu"]
    cpus = [device for device in cluster.devices if device.kind == "cpu"]
    first = gpus[0].name if gpus else ""
    rooms = [Room(gpu.name, _memory(gpu), keeps_room=gpu.name == first) for gpu in gpus]
    return (*rooms, *(Room(cpu.name, _memory(cpu), keeps_room=True, is_gpu=False) for cpu in cpus))


def _cpu(cluster: Cluster) -> Device | None:
    return next((device for device in cluster.devices if device.kind == "cpu"), None)


def _memory(device: Device) -> int:
    return device.budget_bytes or 0
