"""The tensor types of GGUF: how many weights share a block, and the bytes of a block.

Source: the structures of ggml-common.h in llama.cpp; compared with the package `gguf` in tests/plans/gguf.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorType:
    """A stored form of a tensor's rows."""

    name: str
    block_weights: int
    """Weights in a block; a row holds whole blocks."""
    block_bytes: int

    def bytes_of(self, num_weights: int) -> int:
        """Return the bytes of so many weights, in whole blocks."""
        return num_weights // self.block_weights * self.block_bytes


TENSOR_TYPES: Mapping[int, TensorType] = {
    number: TensorType(name, block_weights, block_bytes)
    for number, name, block_weights, block_bytes in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 40),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
    )
}
"""By the number in the file."""

TYPES_BY_NAME: Mapping[str, TensorType] = {known.name: known for known in TENSOR_TYPES.values()}
"""Where safetensors has a type of the same name, it is the same."""
