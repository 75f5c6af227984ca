"""Plans that an engine is known to refuse or to fail with: refused here, with the nearest plan that it takes.

| engine | takes no | where it says so |
|---|---|---|
| vLLM | rank without layers (no KV cache to set up), GPUs and CPUs in one run, CPUs of several machines | its KV cache set-up, its platform for CPUs |
| SGLang | rank without layers, CPU, hosts with unlike numbers of ranks | its layer partition and launcher |
| TensorRT-LLM | rank without layers, CPU, hosts with unlike numbers of ranks | its mapping of ranks |
| all but llama.cpp | plan for a GGUF file | its sizes are those of the file |
| llamarun | other families, weights quantised in other formats than compressed-tensors' packed one | `plans.profile` |
| TensorRT-LLM, llama.cpp | packed weights | the one reads those of its own tools, the other's converter unpacks them |
| SGLang | packed head (it loads, and every logit is wrong) | sgl-project/sglang#35358 |
| vLLM | 8 bits on CPUs, in layers or head | its kernels for CPUs are of 4 bits |
| vLLM, SGLang, llamarun | context beyond the model's | each checks it at the start |
"""  # noqa: E501 - a row of a table

from exporter.emit.nearest import Candidate, as_option, nearest_cut, nearest_even_cut
from exporter.emit.plan_view import hosts_of, is_packed, kind_of, packed_layers, runs_on_cpus
from plans.config.context import beyond_context
from plans.engines.spelling import COUNT_ENGINES, MAP_ENGINES
from plans.errors import UsageError
from plans.plan import Plan
from plans.reading.sizes import format_bytes

REFUSE_LONGER_CONTEXTS = ("vllm", "sglang", "torchrun")
EVEN_HOSTS = ("sglang", "tensorrt-llm")


def refuse_unworkable(plan: Plan, *, engine: str) -> None:
    """Refuse a plan that `engine` cannot run.

    Raises:
        UsageError: what it cannot run, and the nearest plan that it can.
    """
    _refuse_gguf(plan, engine)
    _refuse_long_context(plan, engine)
    _refuse_packed(plan, engine)
    if engine == "torchrun" and plan.profile.not_run is not None:
        raise UsageError(f"torchrun starts llamarun, which does not run {plan.profile.not_run}", hint=_others(plan))
    if engine not in COUNT_ENGINES:
        return
    if all(kind_of(plan, stage) == "cpu" for stage in plan.stages):
        _refuse_cpus(plan, engine)
    fault = _mixed_kinds(plan, engine) or _empty_stages(plan) or _unlike_hosts(plan, engine)
    if fault:
        raise UsageError(f"{engine} does not run this plan: {fault}", hint=_way_out(plan, engine))


def _refuse_gguf(plan: Plan, engine: str) -> None:
    model = plan.profile.model
    if model.source == "gguf" and engine != "llama.cpp":
        raise UsageError(
            f"{engine} does not run this plan: it was made for a GGUF file ({model.quantization}), and its sizes are "
            "those of llama.cpp",
            hint="--for llama.cpp takes it; for another engine solve again for the safetensors checkpoint",
        )


def _refuse_packed(plan: Plan, engine: str) -> None:
    if not is_packed(plan):
        return
    fault, way_out = _packed_fault(plan, engine)
    if fault:
        raise UsageError(f"{engine} does not run this plan: {fault}", hint=way_out)


def _packed_fault(plan: Plan, engine: str) -> tuple[str, str]:
    """What is wrong with packed weights, and what to do; two empty texts where nothing is."""
    head = plan.profile.head.weights
    if engine == "tensorrt-llm":
        return (
            "it reads packed weights of NVIDIA's Model Optimizer alone",
            f"solve again without --weights; {_others(plan)}",
        )
    if engine == "llama.cpp":
        return (
            "its converter unpacks the weights, which then have other sizes than planned",
            "plan a GGUF file of the model: Q8_0 and Q4_0 hold the same numbers as int8 and int4",
        )
    if engine == "sglang" and head is not None:
        return f"it reads a head in {head} wrongly, without an error", "solve again with --head-weights bf16"
    if runs_on_cpus(plan, engine=engine) and "int8" in packed_layers(plan):
        return (
            "its build for CPUs has no kernels for 8-bit weights",
            f"solve again with --weights int4{_bf16_head(plan)}",
        )
    if runs_on_cpus(plan, engine=engine) and head is not None:
        return f"its build for CPUs has no kernels for a head in {head}", "solve again with --head-weights bf16"
    return "", ""


def _bf16_head(plan: Plan) -> str:
    return "" if plan.profile.head.weights is None else " --head-weights bf16"


def _refuse_long_context(plan: Plan, engine: str) -> None:
    model, tokens = plan.profile.model, plan.workload.context_tokens
    longest = model.longest_context_tokens
    if tokens > longest and engine in REFUSE_LONGER_CONTEXTS:
        what = beyond_context(tokens, longest=longest, trained=model.max_position_embeddings)
        raise UsageError(f"{what}; {engine} refuses such a context", hint=f"solve again with --ctx-size {longest}")


def _refuse_cpus(plan: Plan, engine: str) -> None:
    if engine != "vllm":
        raise UsageError(
            f"{engine} does not run this plan: every stage is planned for a CPU",
            hint="--for vllm takes it (its build for CPUs); " + _others(plan),
        )
    names = [host.name for host in hosts_of(plan)]
    if len(names) > 1:
        raise UsageError(
            f"vllm does not run this plan: its build for CPUs runs on one machine, the plan spans {', '.join(names)}",
            hint=_others(plan),
        )


def _mixed_kinds(plan: Plan, engine: str) -> str:
    """Stages on what the engine does not run on, beside others."""
    if runs_on_cpus(plan, engine=engine):
        return ""
    kinds = [kind_of(plan, stage) for stage in plan.stages]
    bad = [f"stage {i} is planned for {s.device} ({k})" for i, (s, k) in enumerate(zip(plan.stages, kinds, strict=True))
           if k in ("cpu", "mps")]  # fmt: skip
    return f"{', '.join(bad)}, and every rank is a GPU" if bad else ""


def _empty_stages(plan: Plan) -> str:
    empty = [
        f"stage {i} ({stage.words} on {stage.device})" for i, stage in enumerate(plan.ranges) if not stage.num_layers
    ]
    return f"{', '.join(empty)} holds no layer" if empty else ""


def _unlike_hosts(plan: Plan, engine: str) -> str:
    hosts = hosts_of(plan)
    if engine not in EVEN_HOSTS or len({len(host.stages) for host in hosts}) == 1:
        return ""
    numbers = ", ".join(f"{host.name} {len(host.stages)}" for host in hosts)
    return f"hosts hold different numbers of stages ({numbers}), and the engine expects the same on each"


def _way_out(plan: Plan, engine: str) -> str:
    """The nearest cut, as options of `llamaplan solve`; or why there is none."""
    candidates = _candidates(plan, engine)
    find = nearest_even_cut if engine in EVEN_HOSTS else nearest_cut
    cut = find(plan, candidates)
    if cut is not None:
        return f"solve again as before, but with --layers {as_option(cut)}, the nearest cut that it takes"
    if not candidates:
        return _others(plan)
    names = ", ".join(c.device for c in candidates)
    needed = sum(stage.total_bytes for stage in plan.stages)
    offered = sum(plan.cluster.device(c.device).budget_bytes or 0 for c in candidates)
    return (
        f"no cut over {names} alone holds it (the plan needs {format_bytes(needed)}, they offer "
        f"{format_bytes(offered)}): solve again with --ctx-size below {plan.workload.context_tokens}; {_others(plan)}"
    )


def _others(plan: Plan) -> str:
    """Which engines take the plan as it is."""
    engines = list(MAP_ENGINES) if len(hosts_of(plan)) == 1 else []
    if plan.profile.not_run is None:
        engines.append("torchrun")
    return (
        f"as it is, the plan runs with --for {' or '.join(engines)}" if engines else "no other engine takes it as it is"
    )


def _candidates(plan: Plan, engine: str) -> list[Candidate]:
    """Devices that the engine can use, host by host as it numbers its ranks."""
    on_cpus = runs_on_cpus(plan, engine=engine)
    stages = [plan.stages[i] for host in hosts_of(plan) for i in host.stages]
    return [
        Candidate(stage.device, plan.cluster.device(stage.device).host, stage.range.num_layers)
        for stage in stages
        if on_cpus or kind_of(plan, stage) not in ("cpu", "mps")
    ]
