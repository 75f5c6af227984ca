"""One way to store a matrix in few bits: whole numbers packed into words, one scale per group of columns.

The format is compressed-tensors' `pack-quantized`, symmetric. `X.weight_packed` holds every number + 2^(bits - 1),
bit by bit from the lowest of a word: of int4 byte k holds column 2k in its low half and 2k + 1 in its high half, of
int8 byte k is column k. `X.weight_scale` holds one float per group of a row, `X.weight_shape` the two sides.
Source: `compressed_tensors.compressors.pack_quantized`.
"""

from dataclasses import dataclass
from typing import Literal

PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
"""The three tensors of a packed linear layer: `X.weight_packed` and so on."""
PACKED_PARTS = (PACKED, SCALE, SHAPE)
WORD_BITS = 32
_SHAPE_BYTES = 16


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the numbers of one matrix are stored.

    >>> INT4.packed_shape(64, 128), INT4.scale_shape(64, 128), INT4.size_bytes(64, 128)
    ((64, 16), (64, 4), 4624)
    """

    bits: Literal[4, 8]
    group_size: int | None
    """Columns that share a scale; None for one scale per row (strategy `channel`)."""

    @property
    def words(self) -> str:
        """Such as `int4 g32`, or `int8 per row`."""
        return f"int{self.bits} per row" if self.group_size is None else f"int{self.bits} g{self.group_size}"

    def num_groups(self, in_: int) -> int:
        """Return how many scales a row of `in_` columns has."""
        return 1 if self.group_size is None else in_ // self.group_size

    def can_pack(self, out: int, in_: int) -> bool:
        """Return whether a matrix of `out` rows and `in_` columns fills whole words and whole groups."""
        return out > 0 and in_ > 0 and in_ * self.bits % WORD_BITS == 0 and in_ % (self.group_size or in_) == 0

    def packed_shape(self, out: int, in_: int) -> tuple[int, int]:
        """Return the shape of `weight_packed`, in words."""
        return out, in_ * self.bits // WORD_BITS

    def scale_shape(self, out: int, in_: int) -> tuple[int, int]:
        """Return the shape of `weight_scale`."""
        return out, self.num_groups(in_)

    def size_bytes(self, out: int, in_: int, *, scale_bytes: int = 2) -> int:
        """Return the stored bytes of a matrix: packed numbers, scales and the two sides."""
        return out * (in_ * self.bits // 8 + self.num_groups(in_) * scale_bytes) + _SHAPE_BYTES


INT4 = Scheme(4, 32)
INT8 = Scheme(8, 32)
"""What is written here; other groups are read."""


def is_linear(module: str) -> bool:
    """Return whether a module of a supported family is a linear layer: its projections, and the head.

    >>> is_linear("model.layers.0.mlp.up_proj"), is_linear("lm_head"), is_linear("model.embed_tokens")
    (True, True, False)
    >>> is_linear("model.layers.0.block_sparse_moe.experts.7.w2"), is_linear("model.layers.0.block_sparse_moe.gate")
    (True, False)
    """
    return module == "lm_head" or module.endswith(("_proj", ".w1", ".w2", ".w3"))


def is_expert_scale(name: str) -> bool:
    """Return whether a tensor holds scales of a routed expert. They keep their dtype: the expert is computed in it."""
    return name.endswith("." + SCALE) and ".experts." in name
