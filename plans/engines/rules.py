"""How other engines divide a number of layers over ranks or devices, as plain arithmetic.

Written from the rules, which are published with the engines (the tests hold the vectors and where they come from):

| engine | rule |
|---|---|
| vLLM | equal counts; one more for the last ranks but one, but two, ...; the last rank never gets one |
| SGLang | equal counts; one more for the last ranks |
| TensorRT-LLM | equal counts; one more for the first ranks |
| exo | proportional to memory by largest remainders; every node gets at least one |
| llama.cpp | a layer goes to the first device whose cumulative share of the split exceeds the layer's own position |
"""

import bisect
import struct
from collections.abc import Sequence


def vllm_layers(num_layers: int, *, num_ranks: int) -> tuple[int, ...]:
    """Return the layers per rank.

    Source: vLLM, `vllm/distributed/utils.py`, get_pp_indices.

    Example:
        >>> vllm_layers(5, num_ranks=3)
        (2, 2, 1)
    """
    base, extra = divmod(num_layers, num_ranks)
    return tuple(base + (num_ranks - 1 - extra <= rank < num_ranks - 1) for rank in range(num_ranks))


def sglang_layers(num_layers: int, *, num_ranks: int) -> tuple[int, ...]:
    """Return the layers per rank.

    Source: SGLang, `python/sglang/srt/distributed/utils.py`, get_pp_indices.

    Example:
        >>> sglang_layers(5, num_ranks=3)
        (1, 2, 2)
    """
    base, extra = divmod(num_layers, num_ranks)
    return tuple(base + (rank >= num_ranks - extra) for rank in range(num_ranks))


def tensorrt_llm_layers(num_layers: int, *, num_ranks: int) -> tuple[int, ...]:
    """Return the layers per rank.

    Source: TensorRT-LLM, `tensorrt_llm/mapping.py`, Mapping.pp_layers.

    Example:
        >>> tensorrt_llm_layers(5, num_ranks=3)
        (2, 2, 1)
    """
    base, extra = divmod(num_layers, num_ranks)
    return tuple(base + (rank < extra) for rank in range(num_ranks))


def exo_layers(num_layers: int, *, memory_bytes: Sequence[int]) -> tuple[int, ...]:
    """Return the layers per node: whole shares first, then one each to the largest remainders.

    Source: exo, `src/exo/master/placement_utils.py`, allocate_layers_proportionally.

    Example:
        >>> exo_layers(12, memory_bytes=(312, 518, 1024))
        (2, 3, 7)
    """
    total = sum(memory_bytes)
    shares = [divmod(size * num_layers, total) for size in memory_bytes]
    layers = [whole for whole, _rest in shares]
    by_rest = sorted(range(len(shares)), key=lambda node: -shares[node][1])  # equal remainders: the earlier node
    for node in by_rest[: num_layers - sum(layers)]:
        layers[node] += 1
    for node, count in enumerate(layers):
        if not count:
            layers[layers.index(max(layers))] -= 1
            layers[node] = 1
    return tuple(layers)


def llama_cpp_owners(num_layers: int, *, split: Sequence[float], num_gpu_layers: int) -> tuple[int | None, ...]:
    """Return the device of every layer and, last, of the output; None for what stays on the CPU.

    Of layers and output, the last `num_gpu_layers` go to the devices. The engine computes in 32-bit floats, and so does
    this: a layer that falls exactly between two devices may depend on it.

    Source: llama.cpp, `src/llama-model.cpp`, load_tensors.

    Example:
        >>> llama_cpp_owners(4, split=(3, 2), num_gpu_layers=4)
        (None, 0, 0, 1, 1)
    """
    on_devices = min(num_gpu_layers, num_layers + 1)
    first = num_layers + 1 - on_devices
    ends: list[float] = []
    for part in split:
        ends.append(_single(_single(part) + (ends[-1] if ends else 0.0)))
    ends = [_single(end / ends[-1]) for end in ends]
    owners = [bisect.bisect_right(ends, _single(position / on_devices)) for position in range(on_devices)]
    return (*([None] * first), *owners)


def _single(value: float) -> float:
    """Return the nearest 32-bit float."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
