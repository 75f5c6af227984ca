"""The small files around the weights: configuration, tokenizer, chat template, licence, index."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.foreign.origin import Origin
from exporter.layout import Layout
from plans.checkpoint.folder import link_home
from plans.checkpoint.names import EMBEDDING
from plans.checkpoint.units import CONFIG_NAME, INDEX_NAME, Checkpoint
from plans.dtypes import DTYPES
from plans.errors import InputError, IntegrityError
from plans.export.manifest import PLAN_NAME, SourceFile
from plans.packed.config import quantization_config
from plans.plan import Plan
from plans.reading.files import read_limited, sha256_hex
from plans.reading.strict import dump_json

MAX_FILE_BYTES = 256 << 20
MATRIX = 2

COPIED_NAMES = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "README.md",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
"""What an engine, a tokenizer or a licence asks for; nothing else is copied, and never code."""

TEMPLATE_FOLDER = "additional_chat_templates"


@dataclass(frozen=True, slots=True)
class RootFiles:
    """Names and contents to write, and the source files they were read from."""

    contents: Mapping[str, bytes]
    source: tuple[SourceFile, ...]
    warnings: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(map(len, self.contents.values()))


def collect(origin: Origin, *, layout: Layout, plan: Plan) -> RootFiles:
    """Read the root files of a checkpoint and derive those that the export has of its own.

    A single file has none: those that it becomes are written.

    Raises:
        InputError: one of them is not a regular file or too large.
        IntegrityError: `config.json` was changed since the checkpoint was opened.
        MachineError: not readable.
    """
    checkpoint, directory = origin.checkpoint, origin.directory
    names = () if origin.is_single_file else [name for name in COPIED_NAMES if name not in origin.left_out]
    read = _read_all(checkpoint, directory, names)
    source = tuple(SourceFile(name=name, size=len(data), sha256=sha256_hex(data)) for name, data in read.items())
    warnings = _warnings(origin, layout)
    contents = read | dict(origin.small_files(warnings.append))
    stated, packing = _dtype_to_state(checkpoint, layout, plan), _packing_to_state(layout)
    if stated is not None or packing or origin.stored is not None or checkpoint.config.part_of is not None:
        contents[CONFIG_NAME] = _derived_config(checkpoint, stated, packing)
    contents[INDEX_NAME] = index_json(layout).encode()
    contents[PLAN_NAME] = plan.to_json().encode()
    return RootFiles(contents, source, tuple(warnings))


def _read_all(checkpoint: Checkpoint, directory: Path, names: Iterable[str]) -> dict[str, bytes]:
    read = {name: _read(directory, name) for name in names if os.path.lexists(directory / name)}
    found = sha256_hex(read[CONFIG_NAME]) if CONFIG_NAME in read else checkpoint.config.sha256
    if found != checkpoint.config.sha256:
        raise IntegrityError(
            f"was changed during the export: sha256 {checkpoint.config.sha256} before, {found} now",
            where=directory / CONFIG_NAME,
            hint="export again",
            code="E-CHANGED",
        )
    return read


def _read(directory: Path, name: str) -> bytes:
    path = directory / name
    if path.is_symlink() and not path.resolve().is_relative_to(link_home(directory)):
        raise InputError(
            f"{name} is a link out of the folder", where=directory, hint="copy the file into it", code="E-SYMLINK"
        )
    return read_limited(path, max_bytes=MAX_FILE_BYTES)


def _dtype_to_state(checkpoint: Checkpoint, layout: Layout, plan: Plan) -> str | None:
    """The dtype that `config.json` has to state: another than before, or one that the files no longer tell.

    transformers takes the first weight's where nothing is stated, and in an export another tensor comes first.
    """
    if any(piece.is_converted for stage in layout.stages for piece in stage.pieces):
        return layout.dtype
    is_told = checkpoint.config.states_dtype or layout.dtype == plan.profile.dtype
    return None if is_told else plan.profile.dtype


def _packing_to_state(layout: Layout) -> dict[str, Any]:
    """The `quantization_config` of packed weights; empty where none are packed."""
    if not layout.schemes:
        return {}
    matrices = [p for stage in layout.stages for p in stage.pieces if len(p.shape) == MATRIX and p.name != EMBEDDING]
    return quantization_config(layout.schemes, ignore=["lm_head", *(p.module for p in matrices if p.scheme is None)])


def _derived_config(checkpoint: Checkpoint, dtype: str | None, packing: dict[str, Any]) -> bytes:
    """Return `config.json` with its dtype changed, of a larger model the text part's; keys keep their order.

    The dtype is written in the spelling that is already used.
    """
    config = checkpoint.config
    changed: dict[str, Any] = dict(config.raw)
    if config.part_of is not None:
        changed["tie_word_embeddings"] = config.tie_word_embeddings
    if dtype is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in changed] or ["dtype"]
        changed |= dict.fromkeys(keys, DTYPES[dtype].torch)
    if packing:
        changed["quantization_config"] = packing
    return (json.dumps(changed, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def index_json(layout: Layout) -> str:
    """Return `model.safetensors.index.json`: which file holds which tensor."""
    weight_map = {piece.name: stage.name for stage in layout.stages for piece in stage.pieces}
    total = sum(piece.size_bytes for stage in layout.stages for piece in stage.pieces)
    return dump_json({"metadata": {"total_size": total}, "weight_map": weight_map})


def _warnings(origin: Origin, layout: Layout) -> list[str]:
    warnings = list(origin.checkpoint.warnings)
    if layout.left_out:
        shown = ", ".join(layout.left_out[:5]) + (", ..." if len(layout.left_out) > 5 else "")
        warnings.append(f"{len(layout.left_out)} tensors belong to no unit of the model and are left out: {shown}")
    if not origin.is_single_file and (origin.directory / TEMPLATE_FOLDER).is_dir():
        warnings.append(f"the templates in {TEMPLATE_FOLDER}/ are left out; chat_template.jinja is kept")
    return warnings
