"""The share of memory that an engine is told, from budgets, by the engine's own rule.

Every engine takes one number for all its ranks, and gives every rank room for as many tokens as the tightest can hold:

| engine | the number | source |
|---|---|---|
| vLLM | of all memory: what a rank takes altogether; it starts only where so much is free | its CacheConfig |
| SGLang | of what is free before loading: weights and KV cache; the free memory of the tightest rank counts for all | its ModelRunner |
| TensorRT-LLM | of what is free after weights and workspace: the KV cache | its KvCacheConfig |

So the number is the one at which the fullest device is filled to its budget and no other is filled beyond. vLLM's build
for CPUs takes GiB of KV cache instead.
"""  # noqa: E501 - a row of a table

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from plans.plan import Plan
from plans.reading.sizes import format_bytes

MOST = Fraction(99, 100)
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class _Rank:
    """A stage's bytes as an engine sees them."""

    device: str
    memory: int
    budget: int
    weights: int
    cache: int
    """The KV cache that is planned."""
    overhead: int
    fixed: int
    """Everything but the KV cache."""


def share_of_memory(plan: Plan, *, engine: str) -> str:
    """Return the number for `engine`, rounded down, but never below what the plan needs."""
    ranks = _ranks(plan)
    least, most = _SHARES[engine](ranks, Fraction(1)), _SHARES[engine](ranks, _growth(ranks))
    most = min(most, max(least, MOST))
    for digits in (2, 4, 6):
        steps = math.floor(most * 10**digits)
        if Fraction(steps, 10**digits) >= least:
            return f"{steps / 10**digits:.{digits}f}"
    return f"{math.ceil(least * 10**6) / 10**6:.6f}"


def share_limits(plan: Plan, *, engine: str) -> list[str]:
    """Return what a plan's budgets say and one share for all ranks cannot."""
    ranks = _ranks(plan)
    if engine == "vllm":
        share = Fraction(share_of_memory(plan, engine=engine))
        return [
            f"the engine takes one share of memory for all: it starts only where {format_bytes(int(share * r.memory))} "
            f"are free on {r.device}, whose budget is {format_bytes(r.budget)} (it fills no more than planned)"
            for r in ranks
            if share * r.memory > r.budget
        ]
    needed = _SHARES[engine](ranks, Fraction(1))
    if needed <= MOST:
        return []
    return [
        f"the engine would need {float(needed):.2f} of the memory that it counts; it holds fewer tokens than planned"
    ]


def cpu_cache_gib(plan: Plan) -> int:
    """Return the KV cache per rank in whole GiB, as vLLM's build for CPUs takes it."""
    return max(1, math.ceil(max(stage.kv_cache_bytes for stage in plan.stages) / GIB))


def cpu_cache_limits(plan: Plan) -> list[str]:
    """Return the stages that whole GiB of KV cache take beyond their budgets."""
    most = max(stage.kv_cache_bytes for stage in plan.stages)
    growth = Fraction(cpu_cache_gib(plan) * GIB, most) if most else Fraction(1)
    return [
        f"the KV cache is given in whole GiB: stage {i} takes {format_bytes(taken)} of {r.device}, whose budget is "
        f"{format_bytes(r.budget)}"
        for i, r in enumerate(_ranks(plan))
        if (taken := r.fixed + math.ceil(growth * r.cache)) > r.budget
    ]


def _ranks(plan: Plan) -> list[_Rank]:
    return [
        _Rank(
            device=stage.device,
            memory=plan.cluster.device(stage.device).memory_bytes,
            budget=stage.budget_bytes,
            weights=stage.weight_bytes,
            cache=stage.kv_cache_bytes,
            overhead=stage.overhead_bytes,
            fixed=stage.total_bytes - stage.kv_cache_bytes,
        )
        for stage in plan.stages
    ]


def _growth(ranks: Sequence[_Rank]) -> Fraction:
    """How many times the planned KV cache fits into every budget."""
    return min((Fraction(r.budget - r.fixed, r.cache) for r in ranks if r.cache), default=Fraction(1))


def _of_all_memory(ranks: Sequence[_Rank], growth: Fraction) -> Fraction:
    return max((r.fixed + growth * r.cache) / r.memory for r in ranks)


def _of_free_before_loading(ranks: Sequence[_Rank], growth: Fraction) -> Fraction:
    free = [r.memory - r.overhead for r in ranks]
    left = min(r.memory - r.overhead - r.weights for r in ranks)
    return 1 - (left - growth * max(r.cache for r in ranks)) / min(free)


def _of_free_after_loading(ranks: Sequence[_Rank], growth: Fraction) -> Fraction:
    return max((growth * r.cache / (r.memory - r.fixed) for r in ranks if r.cache), default=Fraction(0))


_SHARES: Mapping[str, Callable[[Sequence[_Rank], Fraction], Fraction]] = {
    "vllm": _of_all_memory,
    "sglang": _of_free_before_loading,
    "tensorrt-llm": _of_free_after_loading,
}
