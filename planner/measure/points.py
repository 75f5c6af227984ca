"""What `devices --measure` times: how many layers, at which contexts, batches and prompt lengths, in how much memory.

Everything here follows from the shape and the device's stated rates alone, so that measuring twice fills the same rows.
"""

from dataclasses import dataclass
from pathlib import Path

from planner.timing.roofline import Work, flops, flops_rate, roofline_seconds
from plans.checkpoint.units import Checkpoint
from plans.cluster import Device
from plans.config.config import parse_config
from plans.errors import MachineError
from plans.memory import stage_memory
from plans.profile import ModelProfile
from plans.reading.sizes import format_bytes
from plans.stages import StageRange
from plans.workload import Workload

CONTEXTS = (16, 128, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8)
PROMPTS = (
    *((tokens, 0, 1) for tokens in (16, 64, 256, 512, 1024, 2048)),
    *((tokens, 1024, 1) for tokens in (16, 64, 256)),
    *((tokens, past, 4) for tokens in (16, 64) for past in (0, 1024)),
)
"""(tokens, past tokens, batch): the longer prompts alone, as the curves are straight by then."""
DECODE_STEPS = 12
"""Room for decode steps after the largest context."""
CACHE_MULTIPLE = 4
"""The layers together are this many times the processor's last cache, unless the model itself is smaller."""
DEFAULT_CACHE_BYTES = 64 << 20
PREFILL_LAYER_BYTES = 16 << 20
"""Prompts are long enough to be computed from the cache, so fewer layers are timed: this much, or one."""
LONGEST_POINT_SECONDS = 4.0
"""Points that a layer is expected to take longer for are left to extrapolation."""


DEFAULT_SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
"""The shape that is timed when no model is given: 1.1 billion parameters."""


def default_checkpoint() -> Checkpoint:
    """Return the built-in shape as a bare configuration."""
    config = parse_config(DEFAULT_SHAPE, where="built-in shape", sha256="0" * 64)
    return Checkpoint(Path("llama-1.1b/config.json"), None, config, (), {}, ())


@dataclass(frozen=True, slots=True)
class Points:
    """Where a device is timed; every tuple ascends.

    Attributes:
        num_layers: layers in the chain whose decode steps are timed.
        num_prefill_layers: layers in the chain that reads prompts.
        decode: (context, batch), the token itself included in the context.
        prefill: (tokens, past tokens, batch).
        needed_bytes: memory for all of it.
    """

    num_layers: int
    num_prefill_layers: int
    decode: tuple[tuple[int, int], ...]
    prefill: tuple[tuple[int, int, int], ...]
    needed_bytes: int

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes of decode steps."""
        return tuple(sorted({batch for _context, batch in self.decode}))


def choose_points(profile: ModelProfile, device: Device, *, free_bytes: int, cache_bytes: int) -> Points:
    """Choose what is timed on a device.

    Args:
        profile: the shape.
        device: its stated rates say which points would take too long.
        free_bytes: memory that may be used.
        cache_bytes: last level of the processor's cache; 0 where weights never stay in one.

    Raises:
        MachineError: not even one layer fits, with both numbers.
    """
    layer = profile.layers[0]
    wanted = -(-CACHE_MULTIPLE * cache_bytes // max(layer.weight_bytes, 1))
    decode = _decode_points(profile, device)
    prefill = _prefill_points(profile, device)
    for num_layers in range(min(max(wanted, 1), len(profile.layers)), 0, -1):
        needed = _needed_bytes(profile, num_layers, decode, prefill)
        if needed <= free_bytes:
            few = -(-PREFILL_LAYER_BYTES // max(layer.weight_bytes, 1))
            return Points(num_layers, min(num_layers, few), decode, prefill, needed)
    raise MachineError(
        f"one layer, the embedding and the head of {profile.model.name} need {format_bytes(needed)} ({needed} bytes), "
        f"{format_bytes(free_bytes)} ({free_bytes} bytes) are free",
        where=device.name,
        hint="measure on a machine with more memory, or plan with stated rates",
        code="E-MEMORY",
    )


def last_cache_bytes() -> int:
    """Return the size of the processor's last level cache, or a generous guess where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        digits = text.rstrip("KM")
        sizes += [int(digits) * unit] if digits.isdecimal() else []
    return max(sizes, default=DEFAULT_CACHE_BYTES)


def _decode_points(profile: ModelProfile, device: Device) -> tuple[tuple[int, int], ...]:
    longest = profile.model.max_position_embeddings
    most = max(longest - DECODE_STEPS, 1)
    contexts = sorted({min(context, most) for context in CONTEXTS})
    points = [(context, batch) for context in contexts for batch in BATCHES]
    return tuple(p for p in points if p == points[0] or _is_quick(profile, device, Work(1, p[0] - 1, p[1])))


def _prefill_points(profile: ModelProfile, device: Device) -> tuple[tuple[int, int, int], ...]:
    longest = profile.model.max_position_embeddings
    points = sorted(p for p in PROMPTS if p[0] + p[1] <= longest) or [(longest, 0, 1)]
    return tuple(p for p in points if p == points[0] or _is_quick(profile, device, Work(*p)))


def _is_quick(profile: ModelProfile, device: Device, work: Work) -> bool:
    layer = profile.layers[0]
    rate = flops_rate(device, profile.dtype)
    seconds = max(roofline_seconds(layer, device, work=work, profile=profile), flops(layer, work=work) / rate)
    return seconds <= LONGEST_POINT_SECONDS


def _needed_bytes(
    profile: ModelProfile,
    num_layers: int,
    decode: tuple[tuple[int, int], ...],
    prefill: tuple[tuple[int, int, int], ...],
) -> int:
    """The largest step's memory: layers, both ends, the cache twice (it grows by copying), activations."""
    steps = [(context + DECODE_STEPS, batch, 1) for context, batch in decode]
    steps += [(tokens + past, batch, tokens) for tokens, past, batch in prefill]
    return max(_step_bytes(profile, num_layers, *step) for step in steps)


def _step_bytes(profile: ModelProfile, num_layers: int, context: int, batch: int, tokens: int) -> int:
    workload = Workload(
        prompt_tokens=tokens,
        new_tokens=0,
        context_tokens=context,
        batch_size=batch,
        prefill_chunk_tokens=tokens,
        dtype=profile.dtype,
        kv_cache_dtype=profile.kv_cache_dtype,
    )
    memory = stage_memory(profile, workload=workload, stage=StageRange.whole(num_layers))
    return memory.total_bytes + memory.kv_cache_bytes
