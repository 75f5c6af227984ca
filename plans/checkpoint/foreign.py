"""What lies in a folder that holds no weights we can read, and what to do about it."""

import re
from collections.abc import Collection
from pathlib import Path

from plans.checkpoint.units import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from plans.errors import InputError, LlamaplanError, printable
from plans.reading.files import read_limited
from plans.reading.strict import parse_json

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTERS = (ADAPTER_CONFIG_NAME, "adapter_model.safetensors", "adapter_model.bin")
_MAX_ADAPTER_BYTES = 1 << 20
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".nemo", ".npz", ".onnx")
PART = re.compile(r".*-\d+-of-\d+\.safetensors")


def holds_adapter(names: Collection[str]) -> bool:
    """Whether the files of a LoRA or another adapter are there."""
    return not set(ADAPTERS).isdisjoint(names)


def foreign_weights(folder: Path, names: Collection[str]) -> InputError | None:
    """Return the error that explains the weights a folder holds instead of ours; None if it holds none at all."""
    if holds_adapter(names):
        return _adapter(folder, names)
    original = sorted(n for n in names if n.startswith("consolidated.") or n == "params.json")
    if original and any(name.endswith((".safetensors", ".pth")) for name in original):
        return _foreign(folder, original[0], "which is the vendor's own format")
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if gguf:
        return InputError(
            f"holds {printable(gguf[0])}, which is not safetensors",
            where=folder,
            expected=f"{SINGLE_NAME} or {INDEX_NAME}",
            hint=f"to plan it, give the file itself: {printable(folder / gguf[0], limit=300)}",
            code="E-FORMAT",
        )
    others = sorted(name for name in names if name.endswith(_OTHER_FORMATS))
    if others:
        return _foreign(folder, others[0], "which is not safetensors")
    unknown = sorted(name for name in names if name.endswith(".safetensors"))
    if not unknown or not {SINGLE_NAME, INDEX_NAME}.isdisjoint(names):
        return None
    is_part = PART.fullmatch(unknown[0]) is not None
    return InputError(
        f"holds {printable(unknown[0])}, which is neither {SINGLE_NAME} nor listed by an index",
        where=folder,
        expected=f"{SINGLE_NAME} or {INDEX_NAME}",
        hint="it is a part: fetch the index that came with it, too"
        if is_part
        else f"if it is the whole model, rename it to {SINGLE_NAME}",
        code="E-FORMAT",
    )


def _adapter(folder: Path, names: Collection[str]) -> InputError:
    base = _base_model(folder) if ADAPTER_CONFIG_NAME in names else ""
    return InputError(
        f"holds an adapter{f' for {base}' if base else ''}, not a model",
        where=folder,
        expected=f"{CONFIG_NAME} and {SINGLE_NAME} or {INDEX_NAME}",
        hint="merge it with peft: AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload()"
        ".save_pretrained(TARGET)",
        code="E-ADAPTER",
    )


def _base_model(folder: Path) -> str:
    path = folder / ADAPTER_CONFIG_NAME
    try:
        document = parse_json(read_limited(path, max_bytes=_MAX_ADAPTER_BYTES), where=path)
    except LlamaplanError:
        return ""  # it is an adapter all the same
    base = document.get("base_model_name_or_path") if isinstance(document, dict) else None
    return printable(base) if isinstance(base, str) else ""


def _foreign(folder: Path, name: str, what: str) -> InputError:
    return InputError(
        f"holds {printable(name)}, {what}",
        where=folder,
        expected=f"{SINGLE_NAME} or {INDEX_NAME}",
        hint="convert it: AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET), or fetch the "
        "files that transformers reads",
        code="E-FORMAT",
    )
