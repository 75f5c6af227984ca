"""Checkpoint -> model profile: what every unit of a model costs, without loading weights.

Sizes come from the headers of the safetensors or GGUF files; for the supported families they are compared with the
formula over the configuration, and every difference is named. A bare configuration is sized by the formula alone.
"""

from collections.abc import Iterator, Mapping

from pydantic import ValidationError

from planner.model import formula
from planner.model.crosscheck import differences
from planner.model.evidence import prove
from planner.model.find import find_model, model_name
from planner.model.packing import stored_rows
from planner.model.units import Rows, Sizing, profile_unit
from plans.checkpoint.names import UnitKey, local_name, prefix_of
from plans.checkpoint.run_dtype import run_dtype
from plans.checkpoint.units import Checkpoint, unit_keys, unit_tables
from plans.dtypes import STORED_DTYPES, DtypeName
from plans.errors import InputError
from plans.packed.choice import WeightChoice
from plans.profile import Difference, ModelIdentity, ModelProfile, Origin, ShardIdentity, UnitProfile


def build_profile(
    checkpoint: Checkpoint,
    *,
    dtype: DtypeName | None = None,
    kv_cache_dtype: DtypeName | None = None,
    choice: WeightChoice | None = None,
) -> ModelProfile:
    """Size every unit of a checkpoint.

    Args:
        checkpoint: an opened folder or bare configuration.
        dtype: dtype the model will run in; None for the one transformers would run it in (`run_dtype`).
        kv_cache_dtype: dtype of the KV cache; None for `dtype`.
        choice: how its matrices will be packed (`planner.model.packed.check_packable` says whether they can be); None
            for not at all.

    Returns:
        The profile. Quantised weights count the bytes they are stored in, whatever `dtype` is.

    Raises:
        InputError: the tensors contradict the configuration, or a bare configuration is of an unknown family.

    Example:
        >>> from pathlib import Path
        >>> from plans.checkpoint.folder import open_checkpoint
        >>> build_profile(open_checkpoint(Path("my-model"))).total_parameters  # doctest: +SKIP
        1100048384
    """
    rows = unit_rows(checkpoint)
    if not checkpoint.config.is_supported:
        prove(checkpoint, rows)
    stored = {dtype for unit in rows.values() for dtype, _shape in unit.values()}
    chosen = dtype or run_dtype(checkpoint)
    try:
        sizing = Sizing(
            checkpoint.config, chosen, kv_cache_dtype or chosen, is_gguf=checkpoint.format == "gguf", choice=choice
        )
        return _assemble(checkpoint, rows, stored, sizing)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InputError(
            f"the configured model is too large to size: {'/'.join(map(str, problem['loc']))}: {problem['msg']}",
            where=checkpoint.path,
            code="E-CONFIG",
        ) from None


def unit_rows(checkpoint: Checkpoint) -> Mapping[UnitKey, Rows]:
    """Return the tensors of every unit: those of the headers, or those that a bare configuration implies."""
    return _header_rows(checkpoint) if checkpoint.has_weights else _formula_rows(checkpoint)


def _header_rows(checkpoint: Checkpoint) -> dict[UnitKey, Rows]:
    return {
        table.key: {local_name(name): (t.entry.dtype, t.entry.shape) for name, t in table.tensors.items()}
        for table in unit_tables(checkpoint)
    }


def _formula_rows(checkpoint: Checkpoint) -> dict[UnitKey, Rows]:
    config = checkpoint.config
    formula.require_known(config, where=checkpoint.path)
    shapes = {
        "embedding": formula.embedding_shapes(config),
        "layer": formula.layer_shapes(config),
        "head": formula.head_shapes(config),
    }
    if config.packing is not None:  # layers may be packed in different ways
        return {key: stored_rows(shapes[key[0]], config, prefix=prefix_of(key)) for key in unit_keys(config)}
    rows = {kind: stored_rows(unit, config, prefix="") for kind, unit in shapes.items()}
    return {key: rows[key[0]] for key in unit_keys(config)}


def _assemble(checkpoint: Checkpoint, rows: Mapping[UnitKey, Rows], stored: set[str], sizing: Sizing) -> ModelProfile:
    config = checkpoint.config
    units = tuple(_profile_units(rows, sizing))
    tied_parameters = units[0].parameters if config.tie_word_embeddings else 0
    tied_bytes = units[0].weight_bytes if config.tie_word_embeddings else 0
    return ModelProfile(
        model=_identity(checkpoint, stored),
        dtype=sizing.dtype,
        kv_cache_dtype=sizing.kv_cache_dtype,
        tied=config.tie_word_embeddings,
        units=units,
        total_parameters=sum(unit.parameters for unit in units) - tied_parameters,
        total_weight_bytes=sum(unit.weight_bytes for unit in units) - tied_bytes,
        differences=_named_differences(checkpoint),
        origins=tuple(Origin(number=o.number, key=o.key, how=o.how) for o in config.origins),
    )


def _profile_units(rows: Mapping[UnitKey, Rows], sizing: Sizing) -> Iterator[UnitProfile]:
    sized: dict[tuple[int, int], UnitProfile] = {}  # the formula hands out one table for all layers: size it once
    for key, unit in rows.items():
        bits = sizing.choice.layer_bits[key[1]] if sizing.choice is not None and key[0] == "layer" else 0
        if (id(unit), bits) not in sized:
            sized[id(unit), bits] = profile_unit(key, unit, sizing=sizing)
        window = sizing.config.attention[key[1]].window if key[0] == "layer" else None
        yield sized[id(unit), bits].model_copy(update={"index": key[1], "kv_window_tokens": window})


def _named_differences(checkpoint: Checkpoint) -> tuple[Difference, ...]:
    config = checkpoint.config
    if checkpoint.has_weights:
        return differences(checkpoint)
    if config.quantization is None or config.packing is not None:
        return ()
    note = f"quantised ({config.quantization}): sized as unquantised {config.dtype} until the headers are there"
    return (Difference(name="quantization_config", size_bytes=0, note=note),)


def _identity(checkpoint: Checkpoint, stored: set[str]) -> ModelIdentity:
    config = checkpoint.config
    names = [(STORED_DTYPES[dtype].name if dtype in STORED_DTYPES else None) or dtype for dtype in stored]
    longest = config.longest_context_tokens
    return ModelIdentity(
        name=model_name(checkpoint.path),
        model_type=config.model_type,
        architecture=config.architecture,
        config_sha256=config.sha256,
        source="gguf" if checkpoint.format == "gguf" else "headers" if checkpoint.has_weights else "config",
        shards=tuple(
            ShardIdentity(name=s.name, size_bytes=s.header.file_bytes, header_sha256=s.header.header_sha256)
            for s in checkpoint.shards
        ),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        scaled_context_tokens=longest if longest > config.max_position_embeddings else None,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        stored_dtype=names[0] if len(names) == 1 else "mixed",
        quantization=config.quantization,
        packing=None if config.packing is None else config.packing.words,
    )


__all__ = ["build_profile", "find_model"]
