"""How other engines write down which layers go where, and how those strings are read back.

| engine | string | rule of the engine |
|---|---|---|
| vllm, sglang, tensorrt-llm | ``5,6,5,6`` | layers per rank; as many as ranks, summing to the model's layers |
| llama.cpp | ``6,5/ngl=11`` | the last ``ngl`` of layers + output go to GPUs by the split, the rest to the CPU |
| accelerate, transformers | a device_map (JSON) | every module by name |
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plans.cuts import layer_ranges, read_counts
from plans.engines.rules import llama_cpp_owners
from plans.errors import UsageError, printable
from plans.reading.strict import parse_json

COUNT_ENGINES = ("vllm", "sglang", "tensorrt-llm")
MAP_ENGINES = ("accelerate", "transformers")
ENGINES = (*COUNT_ENGINES, "llama.cpp", *MAP_ENGINES, "torchrun")
MAX_RANKS = 4096

_SPLIT = re.compile(r"(\d{1,6}(?:\.\d{1,6})?(?:,\d{1,6}(?:\.\d{1,6})?)*)(?:/ngl=(\d{1,5}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Partition:
    """Which layers each rank of an engine holds."""

    engine: str
    ranges: tuple[tuple[int, int], ...]
    """Half-open layer ranges in chain order."""
    devices: tuple[str, ...] | None = None
    """Device of each range where the string names them."""
    has_cpu_part: bool = False
    """Whether the first range is the part that stays on the CPU (llama.cpp)."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers per rank."""
        return tuple(end - start for start, end in self.ranges)


def parse_partition(text: str, *, num_layers: int) -> Partition:
    """Read ``ENGINE:STRING`` by the engine's own rules.

    Args:
        text: for example ``vllm:5,6,5,6``, ``llama.cpp:6,5/ngl=11`` or ``accelerate:{"model.embed_tokens": 0, ...}``.
        num_layers: decoder layers of the model.

    Raises:
        UsageError: another form, or counts that the engine itself would refuse.

    Example:
        >>> parse_partition("vllm:5,6,5,6", num_layers=22).ranges
        ((0, 5), (5, 11), (11, 16), (16, 22))
    """
    engine, colon, rest = text.partition(":")
    if colon and engine in COUNT_ENGINES:
        return Partition(engine, _counts(rest, engine, num_layers))
    if colon and engine == "llama.cpp":
        return _llama_cpp(rest, num_layers)
    if colon and engine in MAP_ENGINES:
        return _device_map(rest, engine, num_layers)
    known = ", ".join((*COUNT_ENGINES, "llama.cpp", *MAP_ENGINES))
    raise UsageError(f"'{printable(text)}' names no engine", expected=f"ENGINE:STRING with ENGINE one of {known}")


def llama_cpp_ranges(split: Sequence[float], *, num_gpu_layers: int, num_layers: int) -> tuple[tuple[int, int], ...]:
    """Return the layers llama.cpp puts on the CPU and on each GPU."""
    owners = llama_cpp_owners(num_layers, split=split, num_gpu_layers=num_gpu_layers)[:-1]
    return layer_ranges([owners.count(owner) for owner in (None, *range(len(split)))])


def _counts(text: str, engine: str, num_layers: int) -> tuple[tuple[int, int], ...]:
    counts = [count for count in read_counts(text) or () if count is not None]
    if len(counts) != text.count(",") + 1 or len(counts) > MAX_RANKS:
        raise UsageError(
            f"'{printable(text)}' is no partition of {engine}", expected="layers per rank, such as 5,6,5,6"
        )
    if sum(counts) != num_layers:
        raise UsageError(f"the partition {text} has {sum(counts)} layers, the model has {num_layers}")
    return layer_ranges(counts)


def _llama_cpp(text: str, num_layers: int) -> Partition:
    match = _SPLIT.fullmatch(text)
    if match is None or text.count(",") >= MAX_RANKS:
        raise UsageError(f"'{printable(text)}' is no split of llama.cpp", expected="such as 6,5 or 6,5/ngl=11")
    split = [float(part) for part in match[1].split(",")]
    if not sum(split):
        raise UsageError(f"the split {match[1]} gives nothing to any GPU")
    ngl = num_layers + 1 if match[2] is None else int(match[2])
    ranges = llama_cpp_ranges(split, num_gpu_layers=ngl, num_layers=num_layers)
    has_cpu_part = ranges[0][1] > 0
    return Partition("llama.cpp", ranges if has_cpu_part else ranges[1:], has_cpu_part=has_cpu_part)


def _device_map(text: str, engine: str, num_layers: int) -> Partition:
    table = parse_json(text.encode("utf-8", "surrogatepass"), where=f"--partition {engine}")
    if not isinstance(table, dict) or not all(isinstance(v, int | str) for v in table.values()):
        raise UsageError("not a device_map", expected="a JSON object of module names and devices")
    devices = [_device_of(f"model.layers.{layer}", table) for layer in range(num_layers)]
    runs = [(device, len(list(group))) for device, group in itertools.groupby(devices)]
    return Partition(engine, layer_ranges([count for _, count in runs]), tuple(device for device, _ in runs))


def _device_of(module: str, table: Mapping[str, int | str]) -> str:
    """The device of a module, or of the closest module around it that the map names."""
    name = module
    while name:
        if name in table:
            return str(table[name])
        name = name.rpartition(".")[0]
    if "" in table:
        return str(table[""])
    raise UsageError(f"the device_map names no device for {module}")


def device_map(
    ranges: Sequence[tuple[int, int]], *, devices: Sequence[int | str], is_tied: bool, norm: str = "model.norm"
) -> dict[str, int | str]:
    """Return accelerate's device_map for stages with these layers on these devices.

    The embedding and the rotary table go with the first stage, the final norm and the head with the last. A tied head
    lies beside the embedding: transformers keeps one table for both, and does not load where the map parts them.
    """
    placed: dict[str, int | str] = {"model.embed_tokens": devices[0], "model.rotary_emb": devices[0]}
    for (start, end), device in zip(ranges, devices, strict=True):
        placed |= {f"model.layers.{layer}": device for layer in range(start, end)}
    return {**placed, norm: devices[-1], "lm_head": devices[0] if is_tied else devices[-1]}


def device_map_json(placed: Mapping[str, int | str]) -> str:
    """Return a device_map as JSON, in the order of the chain."""
    return json.dumps(placed, indent=2) + "\n"
