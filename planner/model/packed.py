"""Which checkpoints can be planned, and written, with weights of 8 or 4 bits, and what stays as it is even so."""

from collections.abc import Iterator, Mapping
from typing import Literal

from planner.model.units import MATRIX, Rows, module_of
from plans.checkpoint.names import UnitKey
from plans.checkpoint.packed import expert_fault
from plans.checkpoint.units import Checkpoint
from plans.dtypes import DtypeName
from plans.errors import UsageError
from plans.packed.choice import AS_STORED, SIDE, WeightChoice
from plans.packed.scheme import is_linear

Width = Literal["int8", "int4"]
HeadWidth = Literal["bf16", "int8"]
MOST_NAMED = 8


def choice_of(layer_bits: tuple[int, ...], *, head_bits: int) -> WeightChoice:
    """Return the choice of so many bits for each layer; its kind follows from them."""
    kinds = set(layer_bits)
    kind: Literal["int8", "int4", "mixed"] = "int8" if kinds == {8} else "int4" if kinds == {4} else "mixed"
    return WeightChoice(kind=kind, layer_bits=layer_bits, head_bits=head_bits)


def head_bits(checkpoint: Checkpoint, head: HeadWidth | None) -> int:
    """Return the bits of the head: 8 where it has a table of its own, unless asked otherwise.

    Raises:
        UsageError: (E-WEIGHTS) 8 bits for a head that shares the embedding's table.
    """
    is_tied = checkpoint.config.tie_word_embeddings
    if head == "int8" and is_tied:
        raise UsageError(
            "--head-weights int8: the head shares the embedding's table, which stays as it is",
            where=checkpoint.path,
            hint="leave it out",
            code="E-WEIGHTS",
        )
    return AS_STORED if is_tied or head == "bf16" else 8


def check_packable(checkpoint: Checkpoint, *, dtype: DtypeName, asked: str) -> None:
    """Refuse a checkpoint whose weights cannot be packed.

    Raises:
        UsageError: (E-WEIGHTS) with the reason.
    """
    reason = unpackable(checkpoint, dtype=dtype)
    if reason is not None:
        raise UsageError(f"{asked}: {reason[0]}", where=checkpoint.path, hint=reason[1], code="E-WEIGHTS")


def unpackable(checkpoint: Checkpoint, *, dtype: DtypeName) -> tuple[str, str] | None:
    """Return why the weights cannot be packed, and what to do instead; None where they can."""
    config = checkpoint.config
    if checkpoint.format == "gguf":
        return "a GGUF file is planned with the types it has", "leave --weights out, or plan the checkpoint it is from"
    if config.quantization is not None:
        stored = f"the weights are quantised already ({config.quantization})"
        return stored, "leave --weights out to plan them as they are, or start from the checkpoint they were made of"
    if not config.is_supported:
        return f"llamarun does not run model_type {config.model_type}, so packed weights of it fit nothing", _LEAVE_OUT
    fault = expert_fault(config, checkpoint.tensors)
    if fault is not None:
        return fault, _LEAVE_OUT
    if dtype == "fp32":
        return "scales of packed weights have 16 bits, --dtype says fp32", "add --dtype bf16"
    return None


_LEAVE_OUT = "leave --weights out"


def unpacked_lines(rows: Mapping[UnitKey, Rows], choice: WeightChoice) -> Iterator[str]:
    """Yield the matrices that are too odd to be packed, each name and shape once."""
    seen: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for key, unit in rows.items():
        for name, (_dtype, shape) in unit.items():
            module = module_of(key, name)
            is_chosen = len(shape) == MATRIX and is_linear(module) and _wanted(choice, key)
            if is_chosen and choice.scheme_of(module, out=shape[0], in_=shape[1]) is None:
                seen.setdefault((name, shape), []).append(key[1])
    for (name, shape), layers in list(seen.items())[:MOST_NAMED]:
        where = f" of {len(layers)} layers" if len(layers) > 1 else ""
        sides = " x ".join(map(str, shape))
        yield f"{name}{where} ({sides}) stays as it is: both sides of a packed matrix are multiples of {SIDE}"
    if len(seen) > MOST_NAMED:
        yield f"and {len(seen) - MOST_NAMED} more matrices stay as they are"


def _wanted(choice: WeightChoice, key: UnitKey) -> bool:
    bits = {"embedding": AS_STORED, "head": choice.head_bits}.get(key[0])
    return (choice.layer_bits[key[1]] if bits is None else bits) != AS_STORED
