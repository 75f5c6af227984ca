"""From lazy tensors to a chain, and how fast it computes."""

from collections.abc import Callable, Mapping, Sequence

from transformers import GenerationConfig, PreTrainedConfig

from plans.native.building import Unavailable
from plans.stages import StageRange
from runtime.fast.setup import set_up
from runtime.fast.speed import Speed, parse_speed
from runtime.reading.tensors import place_stages, torch_dtype
from runtime.reading.weights import TensorSource
from runtime.stages.chain import Chain, build_chain


def load_chain(
    config: PreTrainedConfig,
    stages: Sequence[StageRange],
    tensors: TensorSource,
    *,
    dtype: str,
    device_map: Mapping[int, str] | None = None,
    generation_config: GenerationConfig | None = None,
) -> Chain:
    """Build a chain from its parts.

    Args:
        config: the transformers configuration of the whole model.
        stages: the cut, in chain order.
        tensors: lazy tensors by Hugging Face name.
        dtype: `fp32`, `bf16` or `fp16`.
        device_map: stage index -> torch device, where it differs from the device the stage names.
        generation_config: the checkpoint's defaults for `generate()`; None derives them from `config`.

    Raises:
        UsageError: unknown dtype, or a device map for stages that do not exist.
        MachineError: a device is not on this machine.
        InputError: as `runtime.stages.chain.build_chain`.
    """
    chain = build_chain(
        config,
        stages,
        tensors,
        dtype=torch_dtype(dtype),
        devices=place_stages(stages, device_map=device_map or {}),
    )
    if generation_config is not None:
        chain.generation_config = generation_config
    return chain


def set_speed(chain: Chain, speed: str, *, progress: Callable[[str], None] | None = None) -> None:
    """Choose how a loaded chain computes on CPUs and on CUDA.

    Args:
        chain: the model; its `fast` and `reason` say what came of it.
        speed: `reference`, `auto` (the faster path, by measurement) or `max` (native kernels and CUDA graphs
            wherever possible).
        progress: told, in a few words, what takes time: compiling and measuring, once per machine.

    Raises:
        UsageError: `speed` is none of the three.
    """
    if chain.kv_cache_dtype not in (None, chain.dtype) and parse_speed(speed) is not Speed.REFERENCE:
        chain.fast, chain.reason = None, "the fast path keeps keys and values in the dtype it computes in"
        return
    fast = set_up(chain, chain.stages, chain.stage_devices, speed=parse_speed(speed), progress=progress)
    chain.fast = None if isinstance(fast, Unavailable) else fast
    chain.reason = None if fast is None else fast.reason
