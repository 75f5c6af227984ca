"""Binds a plan to the checkpoint it is exported from: same tensors, honest byte counts, and which dtype to write."""

from collections.abc import Callable, Mapping

from plans.check import check_plan
from plans.checkpoint.packed import is_kept
from plans.checkpoint.run_dtype import run_dtype
from plans.checkpoint.units import Checkpoint, UnitTable, check_same_shapes, unit_tables
from plans.config.config import ModelConfig
from plans.dtypes import DTYPE_NAMES, DTYPES
from plans.errors import IntegrityError, UsageError, printable
from plans.packed.tensors import scheme_of_tensor
from plans.plan import Plan
from plans.profile import ModelProfile, ShardIdentity, UnitProfile
from plans.reading.sizes import format_bytes

Say = Callable[[str], None]
"""Told one sentence for a person."""

_SAME_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "num_experts", "num_experts_per_tok",
)  # fmt: skip


def bind(plan: Plan, *, checkpoint: Checkpoint, warn: Say) -> Plan:
    """Check that `plan` was made for the tensors of `checkpoint` and return it, completed by the real headers.

    Another revision of the same shape is fine and only warned about; a plan made from a bare configuration gains the
    shards' identity.

    Raises:
        InputError: the plan is no chain over its model.
        IntegrityError: another model, or byte counts in the plan that the headers and the configuration do not give.
    """
    check_plan(plan, where="the plan")
    profile, config = plan.profile, checkpoint.config
    check_same_shapes({(unit.kind, unit.index): unit.shapes_sha256 for unit in profile.units}, checkpoint)
    for name in _SAME_FIELDS:
        _compare(f"/profile/model/{name}", getattr(profile.model, name), getattr(config, name))
    for unit, table in zip(profile.units, unit_tables(checkpoint), strict=True):
        _check_unit(unit, table, plan=plan, config=config)
    _compare("/profile/tied", profile.tied, config.tie_word_embeddings)
    if profile.model.source == "config":
        return _completed(plan, checkpoint)
    _warn_about_revision(profile, checkpoint, warn)
    return plan


def _check_unit(unit: UnitProfile, table: UnitTable, *, plan: Plan, config: ModelConfig) -> None:
    """Recompute what memory depends on; a plan whose claims were altered to fit does not pass."""
    profile = plan.profile
    where = f"/profile/units/{unit.kind}{unit.index if unit.kind == 'layer' else ''}"
    _compare(f"{where}/stored_weight_bytes", unit.stored_weight_bytes, table.size_bytes)
    _compare(f"{where}/weight_bytes", unit.weight_bytes, _bytes_at(table, plan, config))
    if unit.kind == "layer":
        kept = config.attention[unit.index]
        width = kept.kv_width * DTYPES[profile.kv_cache_dtype].size_bytes
        _compare(f"{where}/kv_bytes_per_token", unit.kv_bytes_per_token, width)
        _compare(f"{where}/kv_window_tokens", unit.kv_window_tokens, kept.window)
        state = kept.state.size_bytes(width=DTYPES[profile.dtype].size_bytes) if kept.state else 0
        _compare(f"{where}/state_bytes_per_sequence", unit.state_bytes_per_sequence, state)


def _bytes_at(table: UnitTable, plan: Plan, config: ModelConfig) -> int:
    total = 0
    for name, stored in table.tensors.items():
        entry = stored.entry
        scheme = scheme_of_tensor(plan.weights, name, entry.shape)
        if scheme is not None:
            total += scheme.size_bytes(*entry.shape)
        else:
            size = entry.num_elements * DTYPES[plan.profile.dtype].size_bytes
            total += entry.size_bytes if is_kept(name, entry.dtype, config) else size
    return total


def _compare(pointer: str, planned: object, found: object) -> None:
    if planned != found:
        raise IntegrityError(
            f"the plan says {planned}, the checkpoint gives {found}",
            where=f"the plan:{pointer}",
            hint="the plan was altered or made for another model; solve again",
            code="E-PLAN-MEMORY",
        )


def _completed(plan: Plan, checkpoint: Checkpoint) -> Plan:
    shards = tuple(
        ShardIdentity(name=s.name, size_bytes=s.header.file_bytes, header_sha256=s.header.header_sha256)
        for s in checkpoint.shards
    )
    update = {"source": "headers", "shards": shards, "config_sha256": checkpoint.config.sha256}
    model = plan.profile.model.model_copy(update=update)
    return plan.model_copy(update={"profile": plan.profile.model_copy(update={"model": model})})


def _warn_about_revision(profile: ModelProfile, checkpoint: Checkpoint, warn: Say) -> None:
    planned, found = profile.model.config_sha256, checkpoint.config.sha256
    if planned != found:
        warn(
            f"the plan was made for another revision of this model: the sha256 of config.json was {planned}, "
            f"here it is {found}"
        )
    recorded: Mapping[str, str] = {shard.name: shard.header_sha256 for shard in profile.model.shards}
    for shard in checkpoint.shards:
        if recorded.get(shard.name) != shard.header.header_sha256:
            warn(
                f"the plan was made for other files of this model: the header of {shard.name} had sha256 "
                f"{recorded.get(shard.name, 'none')}, here it is {shard.header.header_sha256}"
            )
            return


def choose_dtype(requested: str | None, *, plan: Plan, checkpoint: Checkpoint, warn: Say) -> str | None:
    """Return the dtype to convert the weights to, or None to keep every byte.

    Without a request the weights stay as stored, unless the plan was solved for a dtype of its own.

    Raises:
        UsageError: not a dtype, or the checkpoint is quantised.
    """
    profile = plan.profile
    stored = profile.model.stored_dtype
    if requested is None:
        usual = stored if stored in DTYPES else run_dtype(checkpoint)
        is_same = profile.dtype == usual or checkpoint.config.quantization is not None
        return None if is_same else profile.dtype
    target = DTYPE_NAMES.get(requested)
    if target is None:
        raise UsageError(f"'{printable(requested, limit=40)}' is not a dtype", expected="bf16, fp16 or fp32")
    if checkpoint.config.quantization is not None:
        raise UsageError(
            f"the checkpoint is quantised ({checkpoint.config.quantization}) and cannot be converted to {target}",
            hint="export it without --dtype",
        )
    if target != profile.dtype:
        planned = profile.total_weight_bytes
        actual = planned * DTYPES[target].size_bytes // DTYPES[profile.dtype].size_bytes
        warn(
            f"the plan counts {profile.dtype} weights ({format_bytes(planned)}); the export holds {target} "
            f"({format_bytes(actual)})"
        )
    return target
