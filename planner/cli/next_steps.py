"""What a person can do next with a plan or an export: only what works with it is named."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plans.plan import Plan

SERVING = ("vllm", "sglang", "tensorrt-llm", "transformers")


def shown(path: Path | str) -> str:
    """Return a path as it can be pasted into a shell, where no command takes it for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def after_export(plan: "Plan", directory: Path) -> str:
    """Return the next command for a whole export of `plan` in `directory`.

    `llamarun` where it runs the model; without a tokenizer what needs token ids only; else the first engine of
    `SERVING` that takes the plan.
    """
    from plans.checkpoint.units import TOKENIZER_NAMES
    from plans.export.manifest import PLAN_NAME

    why = plan.profile.not_run
    if why is None:
        if any((directory / name).is_file() for name in TOKENIZER_NAMES):
            return f"llamarun generate {shown(directory)} -p 'Once upon a time'"
        return f"llamarun bench {shown(directory)} (there is no tokenizer: prompts of text need one in the folder)"
    engine = _first_engine(plan)
    if engine is None:
        return f"another cut: llamarun does not run {why}, and no other engine takes this one"
    command = f"llamaplan emit {shown(directory / PLAN_NAME)} --for {engine} --directory {shown(directory)}"
    return f"{command} (llamarun does not run {why})"


def after_solve(plan: "Plan", file: Path, *, model: str | None = None) -> str:
    """Return the next command for a plan in `file`: the export, or of a GGUF file the script for llama.cpp."""
    if plan.profile.model.source != "gguf":
        return f"llamaplan export {shown(file)} --model {'MODEL' if model is None else shown(model)} -o shards/"
    from exporter.emit import emit
    from plans.errors import UsageError

    try:
        emit(plan, engine="llama.cpp")
    except UsageError as error:
        return f"another cut, for llama.cpp does not take this one: {error.what}"
    place = plan.profile.model.shards[0].name if model is None else model
    return f"llamaplan emit {shown(file)} --for llama.cpp --directory {shown(place)} -o llama_cpp.sh"


def _first_engine(plan: "Plan") -> str | None:
    from exporter.emit import emit
    from plans.errors import UsageError

    for engine in SERVING:
        try:
            emit(plan, engine=engine)
        except UsageError:
            continue
        return engine
    return None
