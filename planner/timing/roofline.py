"""The roofline: a unit takes as long as its bytes take to read or its FLOPs to compute, whichever is longer.

Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009; applied per unit, as decode is bound by bytes and
prefill by FLOPs.
"""

from dataclasses import dataclass

from plans.cluster import Device
from plans.dtypes import DtypeName
from plans.profile import ModelProfile, UnitProfile


@dataclass(frozen=True, slots=True)
class Work:
    """What a unit is asked to do at once: `batch` sequences, `tokens` new positions each, after `past` cached ones."""

    tokens: int
    past: int
    batch: int

    @property
    def rows(self) -> int:
        """Positions computed."""
        return self.tokens * self.batch


def roofline_seconds(unit: UnitProfile, device: Device, *, work: Work, profile: ModelProfile) -> float:
    """Return max(bytes / bandwidth, FLOPs / rate) + overhead of running `unit` once on `device`."""
    read = bytes_read(unit, work=work, profile=profile) / device.memory_bandwidth_bytes_per_second
    compute = flops(unit, work=work) / flops_rate(device, profile.dtype)
    return max(read, compute) + device.unit_overhead_seconds


def bytes_read(unit: UnitProfile, *, work: Work, profile: ModelProfile) -> float:
    """Return the bytes moved: weights once, the keys and values attended to, and a recurrent state there and back.

    The embedding reads one row per position. With experts the weights are those a batch is expected to touch.
    """
    if unit.kind == "embedding":
        return work.rows * unit.decode_read_bytes
    if unit.kind == "head":
        return unit.decode_read_bytes
    context = work.past + work.tokens
    seen = min(context, unit.kv_window_tokens or context)
    kept = seen * unit.kv_bytes_per_token + 2 * unit.state_bytes_per_sequence
    return _touched_weight_bytes(unit, work.rows, profile) + work.batch * kept


def flops(unit: UnitProfile, *, work: Work) -> int:
    """Return the FLOPs: linear layers per position, attention per (query, key) pair; the head per sequence."""
    if unit.kind == "head":
        return work.batch * unit.flops_per_token
    attention = unit.attention_flops_per_token_per_context * _attended_pairs(work, unit.kv_window_tokens)
    return work.rows * unit.flops_per_token + work.batch * attention


def flops_rate(device: Device, dtype: DtypeName) -> float:
    """Return the rate for `dtype`; hardware without it computes in fp32, or failing that at its slowest rate."""
    rates = device.flops_per_second
    return rates.get(dtype) or rates.get("fp32") or min(rates.values())


def _touched_weight_bytes(unit: UnitProfile, rows: int, profile: ModelProfile) -> float:
    """Weights read for `rows` positions, each choosing k of E experts at random: E (1 - (1 - k/E)^rows) are hit."""
    num, active = profile.model.num_experts, profile.model.num_experts_per_tok
    idle_bytes = unit.weight_bytes - unit.decode_read_bytes
    if not idle_bytes or active >= num:
        return float(unit.weight_bytes)
    hit = num * (1 - (1 - active / num) ** rows)
    return unit.decode_read_bytes + idle_bytes * (hit - active) / (num - active)


def _attended_pairs(work: Work, window: int | None) -> int:
    """Causal attention: the i-th new position sees min(past + i, window) positions."""
    limit = work.past + work.tokens if window is None else window
    growing = max(0, min(work.tokens, limit - work.past))
    return growing * work.past + growing * (growing + 1) // 2 + (work.tokens - growing) * limit
