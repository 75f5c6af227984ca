"""The memory model, in exact integers: what a stage needs on its device.

    weights + KV cache + activation workspace + fixed overhead

The planner plans with these numbers and `plans.check` recomputes every plan with them.
"""

from dataclasses import dataclass

from plans.cluster import Cluster, Device
from plans.dtypes import DTYPES
from plans.profile import ModelProfile, UnitProfile
from plans.stages import StageRange
from plans.workload import Workload


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes one stage needs."""

    weight_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    overhead_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything together; what is compared with the budget."""
        return self.weight_bytes + self.kv_cache_bytes + self.activation_bytes + self.overhead_bytes


def tied_table_bytes(profile: ModelProfile) -> int:
    """Return the bytes that embedding and head share when both are on one device (0 if not tied)."""
    return profile.embedding.weight_bytes if profile.tied else 0


def layer_kv_bytes(layer: UnitProfile, workload: Workload) -> int:
    """Return what one layer keeps of all sequences: batch x requests in flight of them.

    Of each it keeps bytes per token x min(context, window), and the state of a recurrent layer.
    """
    tokens = min(workload.context_tokens, layer.kv_window_tokens or workload.context_tokens)
    each = layer.kv_bytes_per_token * tokens + layer.state_bytes_per_sequence
    return each * workload.batch_size * workload.requests_in_flight


def layer_activation_bytes(profile: ModelProfile, workload: Workload) -> int:
    """Return the workspace of one decoder layer for a prefill chunk.

    Live at the widest point (inside the MLP): the residual, the normed input in fp32 and in the compute dtype, and
    gate, up and their product. Attention holds less: q, k, v and the output.
    """
    model = profile.model
    width = DTYPES[workload.dtype].size_bytes
    rows = workload.batch_size * min(workload.prefill_chunk_tokens, workload.prompt_tokens)
    mlp = 2 * model.hidden_size + 3 * model.intermediate_size
    heads = (2 * model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    attention = 2 * model.hidden_size + heads
    return rows * (max(mlp, attention) * width + 4 * model.hidden_size)


def end_activation_bytes(profile: ModelProfile, workload: Workload, *, has_head: bool) -> int:
    """Return the workspace of the embedding (hidden states) or the head (logits of the last position in fp32)."""
    width = DTYPES[workload.dtype].size_bytes
    rows = workload.batch_size * min(workload.prefill_chunk_tokens, workload.prompt_tokens)
    hidden = rows * profile.model.hidden_size * width
    logits = workload.batch_size * profile.model.vocab_size * (width + 4)
    return hidden + logits if has_head else hidden


def device_overhead_bytes(device: Device, cluster: Cluster, *, is_process_per_stage: bool) -> int:
    """Return the fixed bytes a stage on `device` pays.

    The memory of a process is charged to CPU devices: to each when every stage is a process of its own, otherwise
    once per host, to the first CPU device listed for it.
    """
    if device.kind != "cpu":
        return device.fixed_overhead_bytes
    first = next(d for d in cluster.devices if d.host == device.host and d.kind == "cpu")
    pays = is_process_per_stage or device.name == first.name
    return device.fixed_overhead_bytes + (cluster.host_of(device).process_overhead_bytes if pays else 0)


def stage_memory(
    profile: ModelProfile, *, workload: Workload, stage: StageRange, overhead_bytes: int = 0
) -> StageMemory:
    """Return what a stage needs."""
    units = stage.units(profile)
    layers = [unit for unit in units if unit.kind == "layer"]
    workspaces = [
        end_activation_bytes(profile, workload, has_head=u.kind == "head") for u in units if u.kind != "layer"
    ]
    workspaces += [layer_activation_bytes(profile, workload)] if layers else []
    shared = tied_table_bytes(profile) if stage.has_both_ends else 0
    return StageMemory(
        weight_bytes=sum(unit.weight_bytes for unit in units) - shared,
        kv_cache_bytes=sum(layer_kv_bytes(layer, workload) for layer in layers),
        activation_bytes=max(workspaces, default=0),
        overhead_bytes=overhead_bytes,
    )
