"""One model in several widths: as it is stored, in 8 bits, in 4 bits, or in a mix of them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from planner.model.packed import HeadWidth, Width, check_packable, choice_of, head_bits, unpackable
from planner.model.profile import build_profile
from plans.checkpoint.units import Checkpoint
from plans.errors import UsageError
from plans.packed.choice import WeightChoice
from plans.profile import ModelProfile

Asked = Literal["bf16", "int8", "int4", "auto"]
"""What `--weights` may say."""
BITS: Mapping[Width, int] = {"int8": 8, "int4": 4}
"""The widths, the widest first."""


@dataclass(frozen=True, slots=True)
class Packed:
    """The model with its weights packed."""

    choice: WeightChoice
    profile: ModelProfile
    """Sized for the choice."""


def packed(checkpoint: Checkpoint, plain: ModelProfile, choice: WeightChoice) -> Packed:
    """Size a checkpoint for a choice; `plain` is the checkpoint as it is stored, whose dtypes are kept."""
    profile = build_profile(checkpoint, dtype=plain.dtype, kv_cache_dtype=plain.kv_cache_dtype, choice=choice)
    return Packed(choice, profile)


def uniform(checkpoint: Checkpoint, plain: ModelProfile, width: Width, *, head: HeadWidth | None = None) -> Packed:
    """Size a checkpoint with all its layers in one width.

    Args:
        checkpoint: what will be packed.
        plain: it as it is stored.
        width: of every layer.
        head: of the head; None for int8 where it has a table of its own. One tied to the embedding stays as it is.

    Raises:
        UsageError: (E-WEIGHTS) it cannot be packed, or a tied head was asked for in 8 bits.
    """
    check_packable(checkpoint, dtype=plain.dtype, asked=f"--weights {width}")
    bits = (BITS[width],) * checkpoint.config.num_hidden_layers
    return packed(checkpoint, plain, choice_of(bits, head_bits=head_bits(checkpoint, head)))


def mixed(eight: Packed, four: Packed, narrow: Collection[int]) -> Packed:
    """Return the model with some layers in 4 bits and the others in 8, from both uniform widths.

    Args:
        eight: all layers in 8 bits.
        four: all layers in 4 bits; the head as in `eight`.
        narrow: the numbers of the layers in 4 bits.
    """
    assert eight.profile.head == four.profile.head, "heads of two widths"
    wide, layers = eight.profile, range(len(eight.profile.layers))
    units = [(four if index in narrow else eight).profile.layers[index] for index in layers]
    saved = sum(wide.layers[index].weight_bytes - four.profile.layers[index].weight_bytes for index in narrow)
    profile = wide.model_copy(
        update={
            "units": (wide.embedding, *units, wide.head),
            "total_weight_bytes": wide.total_weight_bytes - saved,
        }
    )
    bits = tuple(4 if index in narrow else 8 for index in layers)
    return Packed(choice_of(bits, head_bits=eight.choice.head_bits), profile)


def as_asked(
    checkpoint: Checkpoint, plain: ModelProfile, *, weights: Asked | None, head: HeadWidth | None = None
) -> Packed | None:
    """Size a checkpoint for `--weights` and `--head-weights`; None where nothing is to be packed, or not yet.

    Raises:
        UsageError: as `uniform`; or a width of the head alone.
    """
    if weights == "int8" or weights == "int4":
        return uniform(checkpoint, plain, weights, head=head)
    if weights is not None:
        dtype = "bf16" if weights == "bf16" else plain.dtype
        check_packable(checkpoint, dtype=dtype, asked=f"--weights {weights}")
    if head is not None and weights != "auto":
        raise UsageError("--head-weights belongs to packed layers", hint="add --weights int8, int4 or auto")
    return None


def measured_as(checkpoint: Checkpoint, plain: ModelProfile, *, weights: Asked | None) -> tuple[Packed | None, ...]:
    """Return the widths whose layers are to be timed, None for as they are stored; `auto` means all of them.

    Raises:
        UsageError: (E-WEIGHTS) it cannot be packed.
    """
    if weights != "auto":
        return (as_asked(checkpoint, plain, weights=weights),)
    check_packable(checkpoint, dtype=plain.dtype, asked="--weights auto")
    return (None, *(uniform(checkpoint, plain, width) for width in BITS))


def narrower_than(
    checkpoint: Checkpoint, plain: ModelProfile, choice: WeightChoice | None, *, head: HeadWidth | None = None
) -> tuple[Packed, ...]:
    """Return the uniform widths below a choice, the widest first; none where the checkpoint cannot be packed."""
    if unpackable(checkpoint, dtype=plain.dtype) is not None:
        return ()
    bits = 16 if choice is None else min(choice.layer_bits)
    return tuple(uniform(checkpoint, plain, width, head=head) for width, size in BITS.items() if size < bits)
