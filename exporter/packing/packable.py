"""Can the weights of a checkpoint be packed as its plan says, and what stays as it is even so?"""

from collections.abc import Iterator

from exporter.layout import Layout
from plans.checkpoint.packed import expert_fault
from plans.checkpoint.units import Checkpoint
from plans.errors import InputError, UsageError
from plans.packed.choice import AS_STORED, SIDE, WeightChoice
from plans.packed.kernel import ROUNDED_DTYPES
from plans.packed.scheme import is_linear

_MATRIX = 2


def check_packable(choice: WeightChoice, *, checkpoint: Checkpoint, dtype: str) -> None:
    """Refuse what cannot be packed.

    Args:
        choice: of the plan.
        checkpoint: what it is a plan for.
        dtype: of the weights that stay.

    Raises:
        InputError: the weights are packed already, or of a dtype that is not rounded.
        UsageError: experts that cannot be packed, a tied head in 8 bits, or weights beside them in fp32.
    """
    config = checkpoint.config
    if config.quantization is not None:
        raise InputError(
            f"is quantised already ({config.quantization}); the plan wants {choice.kind} weights",
            where=checkpoint.path,
            hint="export the checkpoint it was made of, or solve without --weights",
            code="E-QUANT",
        )
    fault = expert_fault(config, checkpoint.tensors)
    if config.num_experts and choice.kind == "mixed":
        fault = "transformers reads the experts of all layers in one width"
    if fault is not None:
        raise UsageError(
            f"the plan wants {choice.kind} weights, and {fault}",
            where=checkpoint.path,
            hint="solve with --weights int8 or int4" if choice.kind == "mixed" else "solve without --weights",
            code="E-WEIGHTS",
        )
    if config.tie_word_embeddings and choice.head_bits != AS_STORED:
        raise UsageError(
            f"the plan gives the head {choice.head_bits} bits, and it shares the embedding's table, which stays",
            hint="solve again with --head-weights bf16",
        )
    if dtype == "fp32":
        raise UsageError(
            "scales of packed weights have 16 bits, the weights beside them would have 32", hint="add --dtype bf16"
        )
    odd = next((s for s in checkpoint.tensors.values() if s.entry.dtype not in ROUNDED_DTYPES), None)
    if odd is not None:
        what = f"{odd.name} is {odd.entry.dtype}, which is not rounded"
        raise InputError(what, where=checkpoint.path, expected=", ".join(ROUNDED_DTYPES), code="E-DTYPE")


def unpacked_lines(choice: WeightChoice, *, layout: Layout) -> Iterator[str]:
    """Yield a sentence for what stays as it is although the plan gives its layer fewer bits.

    Raises:
        InputError: nothing at all can be packed.
    """
    if not layout.schemes:
        raise InputError(
            f"none of its matrices can be packed: none has two sides that are multiples of {SIDE}",
            hint="solve without --weights",
            code="E-SHAPE",
        )
    kept = {
        piece.name: piece.shape
        for stage in layout.stages
        for piece in stage.pieces
        if len(piece.shape) == _MATRIX and is_linear(piece.module) and choice.bits_of(piece.module) != AS_STORED
        if piece.scheme is None
    }
    if kept:
        name, shape = next(iter(kept.items()))
        more = f" and {len(kept) - 1} more matrices" if len(kept) > 1 else ""
        stays = "stay as they are" if more else "stays as it is"
        yield (f"{name} ({shape[0]} x {shape[1]}){more} {stays}: both sides of a packed matrix are multiples of {SIDE}")
