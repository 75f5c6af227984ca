"""Headers against formula: every difference is an error or is named."""

from collections.abc import Iterator, Mapping

from planner.model import formula
from planner.model.packing import can_hold, stored_rows
from plans.checkpoint.names import EMBEDDING, HEAD, local_name, prefix_of, unit_of
from plans.checkpoint.scales import PACKED_NAMES
from plans.checkpoint.units import Checkpoint, StoredTensor, UnitTable, unexpected_tensors, unit_tables
from plans.config.config import ModelConfig
from plans.errors import InputError
from plans.gguf.names import is_scale
from plans.profile import Difference


def differences(checkpoint: Checkpoint) -> tuple[Difference, ...]:
    """Return what the headers hold beyond the formula over the configuration, in name order.

    Tie rule: `tie_word_embeddings` decides; a stored copy of a tied table is named and counted once.

    Raises:
        InputError: a tensor the model cannot do without is missing, or has another shape than the configuration says.
    """
    found = [*_leftovers(checkpoint), *_tied_copy(checkpoint)]
    config = checkpoint.config
    has_own_shapes = config.quantization is None or config.packing is not None or checkpoint.format == "gguf"
    if formula.is_known(config) and has_own_shapes:
        layer = formula.layer_shapes(config)
        for table in unit_tables(checkpoint):
            rows = stored_rows(_expected(table, config, layer), config, prefix=prefix_of(table.key))
            found += _unit_differences(checkpoint, table, {name: shape for name, (_, shape) in rows.items()})
    elif formula.is_known(config):
        _check_quantised(checkpoint)
    return tuple(sorted(found, key=lambda difference: difference.name))


def _leftovers(checkpoint: Checkpoint) -> Iterator[Difference]:
    unexpected = set(unexpected_tensors(checkpoint))
    for name, stored in checkpoint.tensors.items():
        if name in unexpected:
            yield _difference(name, stored, "belongs to no unit; left out")
        elif unit_of(name) is None:
            yield _difference(name, stored, "a rotary table; rebuilt from the configuration when running")


def _tied_copy(checkpoint: Checkpoint) -> Iterator[Difference]:
    if checkpoint.config.tie_word_embeddings and HEAD in checkpoint.tensors:
        yield _difference(HEAD, checkpoint.tensors[HEAD], f"a stored copy of the tied {EMBEDDING}; counted once")


def _expected(table: UnitTable, config: ModelConfig, layer: formula.Shapes) -> formula.Shapes:
    if table.key[0] == "layer":
        is_stacked = any(name.endswith(".experts.gate_up_proj") for name in table.tensors)
        return formula.stacked_experts(layer, config) if is_stacked else layer
    return formula.embedding_shapes(config) if table.key[0] == "embedding" else formula.head_shapes(config)


def _unit_differences(
    checkpoint: Checkpoint, table: UnitTable, expected: Mapping[str, formula.Shape]
) -> Iterator[Difference]:
    prefix = prefix_of(table.key)
    implied = "its metadata imply" if checkpoint.format == "gguf" else "config.json implies"
    held = {local_name(name): stored for name, stored in table.tensors.items()}
    for name, shape in expected.items():
        if name not in held:
            raise InputError(
                f"no tensor {prefix}{name}",
                where=checkpoint.path,
                expected=f"one of shape {list(shape)}, as {implied}",
                code="E-TENSOR",
            )
        if held[name].entry.shape != shape:
            raise InputError(
                f"{prefix}{name} has shape {list(held[name].entry.shape)}, {implied} {list(shape)}",
                where=checkpoint.path,
                code="E-SHAPE",
            )
    for name in held.keys() - expected.keys():
        if checkpoint.format == "gguf" and is_scale(name):
            continue  # of NVFP4, which no configuration speaks of
        yield _difference(prefix + name, held[name], "not part of this family's layers; counted with its unit")


def _check_quantised(checkpoint: Checkpoint) -> None:
    """Weights in somebody else's format: every module is there, and nothing of it belongs to a model of other sizes."""
    layer = formula.layer_shapes(checkpoint.config)
    for table in unit_tables(checkpoint):
        held = {local_name(name): (stored.entry.dtype, stored.entry.shape) for name, stored in table.tensors.items()}
        modules = {name.rpartition(".")[0] for name in held} | {name.split(".weight.")[0] for name in held}
        for name, shape in _expected(table, checkpoint.config, layer).items():
            module, full = name.removesuffix(".weight"), f"{prefix_of(table.key)}{name}"
            if name not in held and module not in modules:
                raise InputError(
                    f"no tensor of {full}, quantised or not",
                    where=checkpoint.path,
                    expected=f"one that holds {list(shape)} weights, as config.json implies",
                    code="E-TENSOR",
                )
            for part in PACKED_NAMES:
                row = held.get(name if part == "weight" else f"{module}.{part}")
                is_sparse = f"{module}.meta" in held  # 2:4: half of the weights, in tiles
                if row is not None and not is_sparse and not can_hold(row, shape):
                    raise InputError(
                        f"{full.removesuffix('weight')}{part} is {row[0]} of shape {list(row[1])}, which cannot hold "
                        f"the {list(shape)} weights that config.json implies",
                        where=checkpoint.path,
                        code="E-SHAPE",
                    )


def _difference(name: str, stored: StoredTensor, note: str) -> Difference:
    return Difference(name=name, size_bytes=stored.entry.size_bytes, note=note)
