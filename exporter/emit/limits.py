"""What a plan says and an engine cannot be told: one sentence each, with the stages it is about."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from exporter.emit.memory_shares import cpu_cache_limits, share_limits
from exporter.emit.nearest import needed_bytes
from exporter.emit.plan_view import has_head_on_cpu, hosts_of, is_packed, kind_of, runs_on_cpus
from plans.config.context import beyond_context
from plans.dtypes import DTYPES
from plans.errors import UsageError
from plans.plan import Plan
from plans.reading.sizes import format_bytes

_GOES_ON = "this engine runs them all the same, and the text is likely to be poor"
_AT_LONGER_CONTEXTS: Mapping[str, str] = {
    "tensorrt-llm": "whether this engine takes them depends on its version",
    "accelerate": _GOES_ON,
    "transformers": _GOES_ON,
    "llama.cpp": _GOES_ON,
}
"""The other engines refuse them, and so does `exporter.emit.refusals`."""


def not_expressed(plan: Plan, *, engine: str) -> tuple[str, ...]:
    """Return what `engine` cannot be told of a plan.

    Raises:
        UsageError: the engine cannot place the layers like this at all.
    """
    return (*_LIMITS[engine](plan), *_common_limits(plan, engine))


def _common_limits(plan: Plan, engine: str) -> list[str]:
    limits = []
    workload = plan.workload
    if workload.kv_cache_dtype != workload.dtype and engine not in {"llama.cpp", "torchrun"}:
        limits.append(f"the KV cache is planned in {workload.kv_cache_dtype}; {engine} keeps it in {workload.dtype}")
    model = plan.profile.model
    if workload.context_tokens > model.longest_context_tokens:
        what = beyond_context(
            workload.context_tokens, longest=model.longest_context_tokens, trained=model.max_position_embeddings
        )
        limits.append(f"{what}; {_AT_LONGER_CONTEXTS[engine]}")
    return limits


def _pipeline_limits(plan: Plan, engine: str) -> list[str]:
    """Engines with one device per rank: scripts are written for CUDA, ranks host by host."""
    limits = [
        f"stage {i} is planned for {stage.device} ({kind_of(plan, stage)}); the script chooses CUDA devices"
        for i, stage in enumerate(plan.stages)
        if kind_of(plan, stage) not in ("cuda", "cpu")
    ]
    memory = cpu_cache_limits(plan) if runs_on_cpus(plan, engine=engine) else share_limits(plan, engine=engine)
    return limits + _host_limits(plan) + memory


def _host_limits(plan: Plan) -> list[str]:
    hosts = hosts_of(plan)
    if [i for host in hosts for i in host.stages] != list(range(len(plan.stages))):
        return ["the chain leaves a host and comes back to it; ranks are numbered host by host"]
    return []


def _vllm_limits(plan: Plan) -> list[str]:
    limits = _pipeline_limits(plan, "vllm")
    if len(hosts_of(plan)) > 2:
        limits.append("Ray puts the host that runs 'vllm serve' first and orders the others itself, not by the plan")
    return limits


def _sglang_limits(plan: Plan) -> list[str]:
    return _pipeline_limits(plan, "sglang")


def _tensorrt_limits(plan: Plan) -> list[str]:
    limits = _pipeline_limits(plan, "tensorrt-llm")
    if plan.workload.dtype == "fp32":
        limits.append("fp32 weights are planned; TensorRT-LLM's kernels are made for bf16 and fp16")
    return limits


def _require_one_host(plan: Plan) -> None:
    hosts = hosts_of(plan)
    if len(hosts) > 1:
        names = ", ".join(host.name for host in hosts)
        raise UsageError(
            f"the plan spans {len(hosts)} hosts ({names}); this engine places layers on one machine only",
            expected="vllm, sglang, tensorrt-llm or torchrun for several hosts",
        )


def _map_limits(plan: Plan) -> list[str]:
    _require_one_host(plan)
    limits = _tied_limits(plan) + _unpacking_limits(plan)
    kinds = [kind_of(plan, stage) for stage in plan.stages]
    if "cpu" in kinds and set(kinds) != {"cpu"}:
        stages = [i for i, kind in enumerate(kinds) if kind == "cpu"]
        limits.append(
            f"stages {stages} are planned to compute on the CPU; accelerate keeps their weights there and moves them "
            "to a GPU for every step"
        )
    return limits


def _unpacking_limits(plan: Plan) -> list[str]:
    """transformers has no kernels for packed weights: the package compressed-tensors unpacks them for good."""
    if not is_packed(plan):
        return []
    width, limits = DTYPES[plan.workload.dtype].size_bytes, []
    for index, stage in enumerate(plan.stages):
        units = [unit for unit in stage.range.units(plan.profile) if unit.weights]
        needed = stage.total_bytes + sum(width * unit.parameters - unit.weight_bytes for unit in units)
        more = f"; its budget is {format_bytes(stage.budget_bytes)}" if needed > stage.budget_bytes else ""
        limits += [f"stage {index} then takes {format_bytes(needed)}{more}"] if units else []
    first = f"transformers unpacks the weights to {plan.workload.dtype} at the first step (with compressed-tensors)"
    return [f"{first}: {', '.join(limits)}"]


def _tied_limits(plan: Plan) -> list[str]:
    first, last = plan.ranges[0], plan.ranges[-1]
    if not plan.profile.tied or first.device == last.device:
        return []
    text = (
        f"the head is tied to the embedding and planned for {last.device}; transformers keeps one table for both, so "
        f"the map puts it on {first.device}"
    )
    needed, budget = needed_bytes(plan, replace(first, has_head=True)), plan.stages[0].budget_bytes
    if needed > budget:
        text += f", which then needs {format_bytes(needed)} and offers {format_bytes(budget)}"
    return [text]


def _llama_cpp_limits(plan: Plan) -> list[str]:
    _require_one_host(plan)
    kinds = [kind_of(plan, stage) for stage in plan.stages]
    on_cpu = [i for i, kind in enumerate(kinds) if kind == "cpu"]
    with_layers = on_cpu[:-1] if has_head_on_cpu(plan) else on_cpu
    if with_layers not in ([], [0]):
        raise UsageError(
            f"llama.cpp puts the first layers on the CPU and the rest on GPUs; here the CPU holds stages {on_cpu}",
            hint="fix an order in which one CPU stage comes first, and solve again",
        )
    limits = []
    if kinds[0] != "cpu":
        limits.append("the embedding is planned for a GPU; llama.cpp keeps it on the CPU")
    if kinds[-1] == "cpu" and len(kinds) == 1:
        limits.append("everything is on the CPU; the split has no meaning")
    return limits


_LIMITS: Mapping[str, Callable[[Plan], list[str]]] = {
    "vllm": _vllm_limits,
    "sglang": _sglang_limits,
    "tensorrt-llm": _tensorrt_limits,
    "accelerate": _map_limits,
    "transformers": _map_limits,
    "llama.cpp": _llama_cpp_limits,
    "torchrun": _host_limits,
}
