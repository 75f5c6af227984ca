"""A plan in the words of another engine: its own partition string, the exact command, and what it cannot express."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from exporter.emit.directory import spelled
from exporter.emit.limits import not_expressed
from exporter.emit.memory_shares import cpu_cache_gib, share_of_memory
from exporter.emit.plan_view import PlanView, has_head_on_cpu, hosts_of, kind_of, runs_on_cpus
from exporter.emit.refusals import refuse_unworkable
from plans.checkpoint.names import final_norm
from plans.engines.spelling import COUNT_ENGINES, ENGINES, device_map, device_map_json
from plans.errors import UsageError, printable
from plans.plan import Plan

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True, slots=True)
class Emission:
    """What `emit` hands out for one engine."""

    engine: str
    files: Mapping[str, str]
    """Suggested file name -> text; one file except for launch scripts, one per host."""
    partition: str
    """``ENGINE:STRING`` as `plans.engines.spelling.parse_partition` reads it back; empty for our own runtime."""
    not_expressed: tuple[str, ...]
    """What the plan says and this engine cannot be told."""


def emit(plan: Plan, *, engine: str, directory: str = "DIR") -> Emission:
    """Write a plan for another engine.

    Args:
        plan: a checked plan.
        engine: one of `plans.engines.spelling.ENGINES`.
        directory: folder of the export, or of the checkpoint, as the commands name it.

    Raises:
        UsageError: no such engine, no such folder's name, or a plan that the engine is known to refuse.
    """
    if engine not in ENGINES:
        raise UsageError(f"no engine is called '{printable(engine)}'", expected=", ".join(ENGINES))
    folder = spelled(directory)
    refuse_unworkable(plan, engine=engine)
    view = PlanView(plan, folder, hosts_of(plan), not_expressed(plan, engine=engine))
    return Emission(engine, _render(engine, view), _partition(engine, view), view.not_expressed)


def _render(engine: str, view: PlanView) -> dict[str, str]:
    if engine == "accelerate":
        return {"device_map.json": device_map_json(_map_of(view))}
    if engine == "torchrun":
        template = _templates().get_template("torchrun.sh.j2")
        return {
            f"launch-{_file_name(host.name)}.sh": template.render(view=view, host=host, rank=rank)
            for rank, host in enumerate(view.hosts)
        }
    name = {"transformers": "run_transformers.py", "llama.cpp": "llama_cpp.sh", "tensorrt-llm": "tensorrt_llm.sh"}
    file = name.get(engine, f"{engine}.sh")
    template = _templates().get_template(f"{file}.j2")
    memory = _memory_of(view.plan, engine) if engine in COUNT_ENGINES else None
    return {file: template.render(view=view, split=_llama_cpp_split(view), placed=_map_of(view), memory=memory)}


@dataclass(frozen=True, slots=True)
class _Memory:
    """What an engine is told of memory: a share of it, or GiB of KV cache per rank; the other is empty."""

    share: str = ""
    cpu_cache_gib: int = 0


def _memory_of(plan: Plan, engine: str) -> _Memory:
    if runs_on_cpus(plan, engine=engine):
        return _Memory(cpu_cache_gib=cpu_cache_gib(plan))
    return _Memory(share=share_of_memory(plan, engine=engine))


@cache
def _templates() -> "jinja2.Environment":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("exporter.emit"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # shell and Python, quoted by the filters below
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["sh"] = shlex.quote
    environment.filters["py"] = repr
    return environment


def _partition(engine: str, view: PlanView) -> str:
    if engine in COUNT_ENGINES:
        return f"{engine}:{view.counts}"
    if engine == "llama.cpp":
        split = _llama_cpp_split(view)
        return f"llama.cpp:{split.text}/ngl={split.num_gpu_layers}"
    return "" if engine == "torchrun" else f"{engine}:{device_map_json(_map_of(view)).strip()}"


def _map_of(view: PlanView) -> dict[str, int | str]:
    ranges = [(stage.start_layer, stage.end_layer) for stage in view.plan.stages]
    profile = view.plan.profile
    norm = final_norm(profile.model.model_type).removesuffix(".weight")
    return device_map(ranges, devices=view.devices(), is_tied=profile.tied, norm=norm)


_HEAD_ON_CPU = {False: r"^output(_norm)?\.weight$=CPU", True: r"^(token_embd|output_norm)\.weight$=CPU"}
"""A tied head is the embedding's table, which lies on the CPU anyway; both patterns name whole tensors."""


@dataclass(frozen=True, slots=True)
class _Split:
    """llama.cpp's arguments."""

    text: str
    num_gpu_layers: int
    override: str = ""
    """Of --override-tensor: patterns of tensors and where they lie."""


def _llama_cpp_split(view: PlanView) -> _Split:
    stages = [stage for stage in view.plan.stages if kind_of(view.plan, stage) != "cpu"]
    parts = [stage.range.num_layers for stage in stages]
    if parts:
        parts[-1] += 1  # the output counts as one more layer and goes to the last GPU
    override = _HEAD_ON_CPU[view.plan.profile.tied] if parts and has_head_on_cpu(view.plan) else ""
    return _Split(",".join(map(str, parts)) or "1", sum(parts), override)


def _file_name(host: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", host)
