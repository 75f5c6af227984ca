"""Where every number of a plan comes from: headers, a formula, a measurement, a statement, an assumption, a proof."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from planner.show.plan import proof_line
from planner.show.words import duration
from planner.timing.costs import CostModel
from planner.timing.topology import Topology
from plans.cluster import Cluster, Device, Link
from plans.dtypes import DTYPES
from plans.plan import Execution, Plan, Stage
from plans.reading.sizes import format_bytes

Origin = Literal["headers", "formula", "measured", "stated", "assumed", "proved"]
MEANINGS: tuple[tuple[Origin, str], ...] = (
    ("headers", "read from the headers of the safetensors files"),
    ("formula", "computed from the configuration, by the formula given"),
    ("measured", "interpolated on a curve that was measured on the device"),
    ("stated", "from the cluster file, the command line or the catalogue of accelerators"),
    ("assumed", "nobody said, so a cautious value was taken"),
    ("proved", "by the solver, and where it says so by a second method"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """One number or group of numbers, and how it came about."""

    what: str
    value: str
    origin: Origin
    how: str


def meanings_for(plan: Plan) -> tuple[tuple[Origin, str], ...]:
    """Return what each origin means for a plan: headers are those of the files that it was made from."""
    if plan.profile.model.source != "gguf":
        return MEANINGS
    return tuple((name, what.replace("safetensors", "GGUF")) for name, what in MEANINGS)


def sources_of(plan: Plan, model: CostModel) -> tuple[Source, ...]:
    """Return the origin of everything a plan was computed from, and of what it claims."""
    return (
        _weights(plan),
        _kv_cache(plan),
        _activations(plan),
        *_overheads(plan),
        *(_times(plan.cluster.device(stage.device), stage, model) for stage in plan.stages),
        *_buses(plan, model),
        *_hops(plan, model),
        Source("the plan", plan.proof.status, "stated" if plan.proof.status == "given" else "proved", proof_line(plan)),
    )


def decode_origin(stage: Stage, model: CostModel) -> Origin:
    """Return ``measured`` if all of a stage's decode times lie on measured curves, else ``stated``."""
    units = stage.range.units(model.profile)
    return "measured" if all(model.is_measured(unit, stage.device) for unit in units) else "stated"


def hop_origin(cluster: Cluster, from_device: str, to_device: str, *, execution: Execution) -> Origin:
    """Return whether a route rests on stated links or on what is assumed where none is stated."""
    if from_device == to_device:
        return "formula"
    silent = Topology(cluster.model_copy(update={"links": ()}), execution=execution)
    spoken = Topology(cluster, execution=execution)
    is_same = silent.routes(from_device, to_device) == spoken.routes(from_device, to_device)
    return "assumed" if is_same and not _speaks_of(cluster.links, cluster, from_device, to_device) else "stated"


def _speaks_of(links: tuple[Link, ...], cluster: Cluster, a: str, b: str) -> bool:
    """Whether a link of the pair's class is stated (it may say just what would have been assumed)."""
    is_one_host = cluster.device(a).host == cluster.device(b).host
    return any(link.class_ == ("same_host" if is_one_host else "between_hosts") for link in links)


def _weights(plan: Plan) -> Source:
    profile = plan.profile
    num_files = len(profile.model.shards)
    value = f"{format_bytes(profile.total_weight_bytes)} in {profile.total_parameters:,} parameters"
    if profile.model.source == "config":
        packed = "" if plan.weights is None else f"; packed to {plan.weights.words} at the export"
        how = f"tensor shapes that config.json implies; no weights were there yet{packed}"
        return Source("weights", value, "formula", how)
    is_gguf = profile.model.source == "gguf"
    files = f"{num_files} {'GGUF' if is_gguf else 'safetensors'} file{'s' if num_files > 1 else ''}"
    stored = f"stored ({profile.model.storage_words})" if is_gguf or profile.model.packing else profile.dtype
    tied = "; embedding and head share one table" if profile.tied else ""
    packed = "" if plan.weights is None else f"; packed to {plan.weights.words} at the export, by the format's sizes"
    return Source("weights", value, "headers", f"dtype and shape of every tensor in {files}, as {stored}{tied}{packed}")


def _kv_cache(plan: Plan) -> Source:
    model, work = plan.profile.model, plan.workload
    width = DTYPES[work.kv_cache_dtype].size_bytes
    per_token = 2 * model.num_key_value_heads * model.head_dim * width
    rule = f"2 (key, value) x {model.num_key_value_heads} heads x {model.head_dim} x {width} bytes = {per_token} bytes"
    kept = {layer.kv_bytes_per_token for layer in plan.profile.layers}
    if kept != {per_token}:
        sizes = " or ".join(str(size) for size in sorted(kept))
        said = (f"{o.key}: {o.how}" for o in plan.profile.origins if o.number == "kv_bytes_per_token")
        rule = f"{'; '.join(said)}; {sizes} bytes"
    states = [layer.state_bytes_per_sequence for layer in plan.profile.layers if layer.state_bytes_per_sequence]
    state = f" and {max(states)} bytes of state in {len(states)} layers" if states else ""
    how = (
        f"{rule} per token and layer, for {work.context_tokens} tokens (or its window){state}, x "
        f"batch {work.batch_size} x {work.requests_in_flight} in flight"
    )
    total = sum(stage.kv_cache_bytes for stage in plan.stages)
    return Source("KV cache", format_bytes(total), "formula", how)


def _activations(plan: Plan) -> Source:
    largest = max(stage.activation_bytes for stage in plan.stages)
    how = f"workspace of a stage's widest unit for {plan.workload.prefill_chunk_tokens} prompt tokens at once"
    return Source("activations", f"up to {format_bytes(largest)}", "formula", how)


def _overheads(plan: Plan) -> Iterator[Source]:
    fixed = ", ".join(f"{stage.device} {format_bytes(stage.overhead_bytes)}" for stage in plan.stages)
    budgets = ", ".join(f"{stage.device} {format_bytes(stage.budget_bytes)}" for stage in plan.stages)
    yield Source("fixed overhead", fixed, "stated", "framework context and allocator slack per device, and per process")
    yield Source("budgets", budgets, "stated", "given, or free memory minus a margin for each device")


def _times(device: Device, stage: Stage, model: CostModel) -> Source:
    what, value = f"time on {device.name}", f"{duration(stage.decode_seconds)} per token"
    units = stage.range.units(model.profile)
    num_measured = sum(model.is_measured(unit, device.name) for unit in units)
    beyond = ", beyond what was measured" if any(model.is_extrapolated(u, device.name) for u in units) else ""
    if num_measured == len(units):
        ran = sorted({f"{t.path} path, {t.threads or 'default'} threads" for t in device.timings})
        return Source(what, value, "measured", f"curves of this device ({'; '.join(ran)}){beyond}")
    rate = device.flops_per_second.get(model.profile.dtype) or max(device.flops_per_second.values())
    how = (
        f"max(bytes / {device.memory_bandwidth_bytes_per_second / 1e9:.4g} GB/s, FLOPs / {rate / 1e12:.4g} TFLOP/s) + "
        f"{duration(device.unit_overhead_seconds)} per unit"
    )
    if num_measured:
        how += f"; {num_measured} of {len(units)} units by measured curves{beyond}"
    return Source(what, value, "stated", how)


def _buses(plan: Plan, model: CostModel) -> Iterator[Source]:
    for host, seconds in zip(model.buses, model.stages_bus_seconds(plan.ranges), strict=True):
        rate = next(h.memory_bandwidth_bytes_per_second for h in plan.cluster.hosts if h.name == host)
        assert rate is not None, f"{host} is no host of `buses`"
        how = (
            f"bytes / {rate / 1e9:.4g} GB/s, what {', '.join(model.buses[host])} read together, as the cluster says; "
            "'devices --measure' measures it"
        )
        yield Source(f"memory bus of {host}", f"{duration(seconds)} per token", "stated", how)


def _hops(plan: Plan, model: CostModel) -> Iterator[Source]:
    ways = [(a.device, b.device, a.hop_seconds) for a, b in pairwise(plan.stages)]
    if ways:
        ways.append((plan.stages[-1].device, plan.stages[0].device, plan.prediction.return_hop_seconds))
    for a, b, seconds in ways:
        routes = model.topology.routes(a, b)
        how = " or ".join(
            f"{duration(r.latency_seconds)} + bytes / {r.bandwidth_bytes_per_second / 1e9:.4g} GB/s" for r in routes
        )
        origin = hop_origin(plan.cluster, a, b, execution=plan.execution)
        yield Source(f"{a} to {b}", duration(seconds), origin, how)
