"""The tables of `llamaplan analyze`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from planner.show.words import count_text
from plans.commands.console import table
from plans.memory import layer_activation_bytes, layer_kv_bytes, tied_table_bytes
from plans.profile import ModelProfile, UnitProfile
from plans.reading.sizes import format_bytes
from plans.workload import Workload

if TYPE_CHECKING:
    from rich.table import Table

MAX_DIFFERENCES = 12
MAX_LABEL = 12
_SOURCES = {
    "headers": "the safetensors headers",
    "config": "config.json alone",
    "gguf": "the header of the GGUF file",
}


def headline(profile: ModelProfile) -> str:
    """Return one line saying which model it is."""
    model = profile.model
    quantised = f", quantised ({model.storage_words})" if model.quantization else ""
    experts = f", {model.num_experts_per_tok} of {model.num_experts} experts" if model.num_experts else ""
    return (
        f"{model.name}: {model.model_type}, {model.num_hidden_layers} layers of {model.hidden_size}, "
        f"{model.num_attention_heads} heads ({model.num_key_value_heads} KV) of {model.head_dim}, "
        f"vocabulary {model.vocab_size}{experts}, stored in {model.stored_dtype}{quantised}, "
        f"sizes from {_SOURCES[model.source]}"
    )


def unit_table(profile: ModelProfile, workload: Workload) -> "Table":
    """Return the per-unit table; identical layers share a row that counts one of them."""
    numbers = (
        "parameters",
        f"weights\n{_stored_as(profile)}",
        "read\n/token",
        f"KV {profile.kv_cache_dtype}\n/token",
        f"KV cache\n{_context(workload)}",
        "FLOPs\n/token",
    )
    found = table("unit", numbers=numbers)
    for label, unit in _rows(profile):
        found.add_row(label, *_cells(unit, workload))
    found.add_row("total", *_total_cells(profile, workload), style="bold")
    return found


def summary_lines(profile: ModelProfile, workload: Workload) -> Iterator[str]:
    """Yield what the model needs altogether, and the named differences."""
    needed = memory_summary(profile, workload)
    attention = count_text(sum(layer.attention_flops_per_token_per_context for layer in profile.layers))
    yield f"a row of several layers counts one of them; attention adds {attention} FLOPs per token of context"
    windows = Counter(layer.kv_window_tokens for layer in profile.layers if layer.kv_window_tokens)
    for window, num in sorted(windows.items()):
        yield f"{num} layers keep only the last {window} tokens (sliding window)"
    states = Counter(unit.state_bytes_per_sequence for unit in profile.layers if unit.state_bytes_per_sequence)
    for state, num in states.items():
        yield f"{num} layers keep a state of {format_bytes(state)} per sequence, counted with the KV cache"
    yield (
        f"one device would need {format_bytes(needed['total_bytes'])}: weights "
        f"{format_bytes(needed['weight_bytes'])} + KV cache {format_bytes(needed['kv_cache_bytes'])} "
        f"({_context(workload)}) + workspace {format_bytes(needed['activation_bytes'])}, and the framework"
    )
    if profile.tied:
        shared = format_bytes(tied_table_bytes(profile))
        yield f"embedding and head share one table of {shared}: it counts twice when they are on different devices"
    yield from _packed_lines(profile)
    for origin in profile.origins:
        yield f"{origin.number} from {origin.key}: {origin.how}"
    for difference in profile.differences[:MAX_DIFFERENCES]:
        size = f" ({format_bytes(difference.size_bytes)})" if difference.size_bytes else ""
        yield f"difference: {difference.name}{size}: {difference.note}"
    hidden = len(profile.differences) - MAX_DIFFERENCES
    if hidden > 0:
        yield f"and {hidden} more differences; --json lists all"


def _stored_as(profile: ModelProfile) -> str:
    if profile.model.source == "gguf":
        return "GGUF"
    is_chosen = any(unit.weights for unit in profile.units)
    return profile.model.packing or ("packed" if is_chosen else profile.dtype)


def _packed_lines(profile: ModelProfile) -> Iterator[str]:
    layers = Counter(layer.weights for layer in profile.layers if layer.weights)
    head = f"the head in {profile.head.weights}" if profile.head.weights else ""
    parts = [*(f"{count} layers in {name}" for name, count in sorted(layers.items())), *([head] if head else [])]
    if parts:
        yield f"packed: the matrices of {', '.join(parts)}; everything else in {profile.dtype}"


def memory_summary(profile: ModelProfile, workload: Workload) -> dict[str, int]:
    """Return bytes of the whole model on one device, without the framework's overhead."""
    weights = profile.total_weight_bytes
    cache = sum(layer_kv_bytes(layer, workload) for layer in profile.layers)
    workspace = layer_activation_bytes(profile, workload)
    return {
        "weight_bytes": weights,
        "kv_cache_bytes": cache,
        "activation_bytes": workspace,
        "total_bytes": weights + cache + workspace,
    }


def as_json(profile: ModelProfile, workload: Workload, warnings: Sequence[str]) -> dict[str, Any]:
    """Return the profile's own keys, and beside them what the options asked about."""
    return profile.model_dump(mode="json", by_alias=True) | {
        "workload": workload.model_dump(mode="json"),
        "memory": memory_summary(profile, workload),
        "warnings": list(warnings),
    }


def _rows(profile: ModelProfile) -> Iterator[tuple[str, UnitProfile]]:
    """Units in chain order; layers that differ in nothing but their index are one row."""
    yield "embedding", profile.embedding
    classes: dict[UnitProfile, list[int]] = {}
    for layer in profile.layers:
        classes.setdefault(layer.model_copy(update={"index": 0}), []).append(layer.index)
    for layer, indices in classes.items():
        yield _layers_label(indices), layer
    yield "head", profile.head


def _layers_label(indices: Sequence[int]) -> str:
    """Return ``layers 0-31``, ``layer 3`` or ``layers 0,2,4…``."""
    runs = [[index for _position, index in run] for _key, run in groupby(enumerate(indices), key=lambda p: p[1] - p[0])]
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    short = text if len(text) <= MAX_LABEL else text[: text.rindex(",", 0, MAX_LABEL)] + "…"
    return f"layer{'s' if len(indices) > 1 else ''} {short}"


def _cells(unit: UnitProfile, workload: Workload) -> tuple[str, ...]:
    is_layer = unit.kind == "layer"
    return (
        f"{unit.parameters:,}",
        format_bytes(unit.weight_bytes),
        format_bytes(unit.decode_read_bytes),
        format_bytes(unit.kv_bytes_per_token) if is_layer else "",
        format_bytes(layer_kv_bytes(unit, workload)) if is_layer else "",
        count_text(unit.flops_per_token) if unit.flops_per_token else "",
    )


def _total_cells(profile: ModelProfile, workload: Workload) -> tuple[str, ...]:
    layers, units = profile.layers, profile.units
    return (
        f"{profile.total_parameters:,}",
        format_bytes(profile.total_weight_bytes),
        format_bytes(sum(unit.decode_read_bytes for unit in units)),
        format_bytes(sum(unit.kv_bytes_per_token for unit in layers)),
        format_bytes(sum(layer_kv_bytes(unit, workload) for unit in layers)),
        count_text(sum(unit.flops_per_token for unit in units)),
    )


def _context(workload: Workload) -> str:
    batch = f"{workload.batch_size} x " if workload.batch_size > 1 else ""
    return f"{batch}{workload.context_tokens} tokens"
