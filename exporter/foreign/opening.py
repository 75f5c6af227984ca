"""A model to export -> its origin, whatever its format is."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from exporter.foreign.gguf.checkpoint import open_gguf_origin
from exporter.foreign.origin import Origin
from exporter.foreign.transposed_checkpoint import METHODS, open_transposed_origin, refused
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.names import UnitKey
from plans.checkpoint.units import Checkpoint, check_same_shapes, require_full, unit_tables
from plans.errors import InputError, UsageError

Form = Literal["bf16", "int8", "as stored"]
"""How weights that are quantised in another format are written, where the usual way is not wanted."""
FORMS: tuple[Form, ...] = ("bf16", "int8", "as stored")


def open_origin(model: Path, *, form: Form | None = None) -> Origin:
    """Open a checkpoint folder or a GGUF file to export it.

    Weights of Q8_0, Q4_0, symmetric GPTQ and symmetric AWQ become packed weights of the same numbers.

    Args:
        model: the folder or file.
        form: of a GGUF file, `bf16` or `int8` for types without a packed form, which are refused otherwise; of a
            folder, `as stored` to leave quantised weights in their own format.

    Raises:
        UsageError: a form that belongs to the other of the two.
        InputError, IntegrityError, MachineError: as `plans.checkpoint.folder.open_checkpoint`, and what has no form
            in a checkpoint of packed weights.
    """
    checkpoint = open_checkpoint(model)
    is_file = checkpoint.format == "gguf"
    if form is not None and is_file == (form == "as stored"):
        what = "--as-stored is for folders" if is_file else f"--requantise {form} is for GGUF files"
        raise UsageError(what, where=model, hint=_IN_A_FILE if is_file else _IN_A_FOLDER)
    return _origin_of(checkpoint, form)


_IN_A_FILE = "'llamaplan emit PLAN --for llama.cpp' runs the file as it is"
_IN_A_FOLDER = "'llamaplan solve --weights' says how the weights of a folder are written"


def find_origin(model: Path, *, shapes: Mapping[UnitKey, str]) -> Origin:
    """Open what an export was made from, in whichever of its forms has these tensors.

    Args:
        model: the folder or file.
        shapes: `shapes_sha256` of every unit of the export.

    Raises:
        IntegrityError: the export is of another model.
        InputError, MachineError: as `open_origin`.
    """
    checkpoint = open_checkpoint(model)
    found: Origin | None = None
    for form in (None, *FORMS):
        with suppress(InputError):  # a form that this model does not have
            origin = _origin_of(checkpoint, form)
            found = found or origin
            if shapes == {table.key: table.shapes_sha256 for table in unit_tables(origin.checkpoint)}:
                return origin
    found = found or _origin_of(checkpoint, None)
    check_same_shapes(shapes, found.checkpoint)
    return found


def _origin_of(checkpoint: Checkpoint, form: Form | None) -> Origin:
    if checkpoint.format == "gguf":
        return open_gguf_origin(checkpoint, requantise=None if form == "as stored" else form)
    directory = require_full(checkpoint)
    if form != "as stored":
        table = checkpoint.config.raw.get("quantization_config")
        if checkpoint.config.quantization in METHODS:
            return open_transposed_origin(checkpoint)
        if isinstance(table, dict) and _has_quantised_activations(table):
            raise refused("input_activations of 8 bits", "(W8A8)", "weights alone")
    return Origin(checkpoint, directory)


def _has_quantised_activations(table: Mapping[str, Any]) -> bool:
    """Whether whole numbers are multiplied with whole numbers: W8A8 of compressed-tensors."""
    groups = table.get("config_groups")
    members = list(groups.values()) if isinstance(groups, dict) else []
    inputs = [group.get("input_activations") for group in members if isinstance(group, dict)]
    return any(isinstance(entry, dict) and entry.get("type", "int") == "int" for entry in inputs)
