"""Which tensors go into which stage's file, and where in it: the whole export is known before a byte is copied.

Tensors lie in chain order (unit, then name). Those that are no whole number of cache lines come last, and larger
element sizes come first, so that every tensor starts aligned. The layout depends on the plan and the tensor table
alone, not on how the source was sharded.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from plans.checkpoint.names import UnitKey, unit_of
from plans.checkpoint.units import Checkpoint, StoredTensor, unexpected_tensors, unit_tables
from plans.dtypes import DTYPES, STORED_DTYPES
from plans.export.manifest import weights_name
from plans.export.opening import metadata_of
from plans.packed.scheme import SCALE, Scheme
from plans.packed.tensors import packed_rows, scheme_of_tensor
from plans.plan import Plan
from plans.stages import StageRange

DATA_ALIGNMENT = 64
"""The data of a stage file starts on a multiple of this, so that mapped weights lie on cache lines ..."""

VECTOR_BYTES = 16
"""... or where the source's data starts modulo this: matrix-vector kernels of fp32 sum in another order on other
addresses, and mapped weights shall give the source's logits to the last bit."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a stage file: its name and stored dtype there, and where its bytes come from."""

    name: str
    dtype: str
    source: StoredTensor
    shape: tuple[int, ...]
    scheme: Scheme | None = None
    """How the source is packed; this is then one of the three tensors that come of it."""

    @property
    def is_converted(self) -> bool:
        """Whether floats change their dtype on the way."""
        return self.scheme is None and self.dtype != self.source.entry.dtype

    @property
    def module(self) -> str:
        """The module it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def part(self) -> str:
        """What it is of its module: `weight`, `weight_packed` and so on."""
        return self.name.rpartition(".")[2]

    @property
    def size_bytes(self) -> int:
        """Bytes in the stage file."""
        return math.prod(self.shape) * STORED_DTYPES[self.dtype].size_bytes


@dataclass(frozen=True, slots=True)
class StageLayout:
    """One stage's safetensors file, complete but for the bytes of its tensors."""

    index: int
    name: str
    header: bytes
    """The length prefix and the padded JSON header."""
    pieces: tuple[Piece, ...]

    @property
    def size_bytes(self) -> int:
        """Size of the finished file."""
        return len(self.header) + sum(piece.size_bytes for piece in self.pieces)

    @property
    def scale_bytes(self) -> int:
        """Bytes of scales, which are put aside until their place in the file comes."""
        return sum(piece.size_bytes for piece in self.pieces if piece.part == SCALE and piece.scheme is not None)


@dataclass(frozen=True, slots=True)
class Layout:
    """All stage files, and what is not carried over."""

    stages: tuple[StageLayout, ...]
    dtype: str
    """Dtype of the exported weights: fp32, fp16, bf16, or "mixed"."""
    left_out: tuple[str, ...]
    """Stored tensors that no unit owns; they are in no stage file."""
    has_copied_head: bool
    """Whether a tied head was cut from its embedding and written as a tensor of its own."""

    @property
    def schemes(self) -> dict[str, Scheme]:
        """How modules are packed, those that are."""
        pieces = (piece for stage in self.stages for piece in stage.pieces)
        return {piece.module: piece.scheme for piece in pieces if piece.scheme is not None}


def lay_out(plan: Plan, *, checkpoint: Checkpoint, dtype: str | None) -> Layout:
    """Return the layout of the export of `plan`.

    Args:
        plan: a checked plan for this checkpoint.
        checkpoint: the opened source.
        dtype: fp32, fp16 or bf16 to convert floating-point weights to; None keeps every byte.
    """
    units = {table.key: table.tensors for table in unit_tables(checkpoint)}
    plan_sha256 = plan.sha256
    stages = []
    for index, stage in enumerate(plan.ranges):
        tensors = _tensors_of(stage, units, checkpoint)
        pieces = tuple(_in_file_order(_pieces(tensors, dtype, plan)))
        metadata = metadata_of(index, num_stages=len(plan.stages), plan_sha256=plan_sha256)
        name = weights_name(index, len(plan.stages))
        stages.append(StageLayout(index, name, encode_header(pieces, metadata=metadata), pieces))
    return Layout(
        stages=tuple(stages),
        dtype=dtype_of(piece.dtype for stage in stages for piece in stage.pieces),
        left_out=unexpected_tensors(checkpoint),
        has_copied_head=any(p.scheme is None and _is_copy(p.name, checkpoint) for p in stages[-1].pieces),
    )


def _tensors_of(
    stage: StageRange, units: Mapping[UnitKey, Mapping[str, StoredTensor]], checkpoint: Checkpoint
) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for key in stage.keys:
        tensors |= {name: units[key][name] for name in sorted(units[key])}
    # A tied head needs a copy of the table only where the embedding is not at hand.
    if stage.has_both_ends:
        return {name: stored for name, stored in tensors.items() if not _is_copy(name, checkpoint)}
    return tensors


def _is_copy(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tied head's tensor is stored as the embedding's alone."""
    return unit_of(name) == ("head", 0) and name not in checkpoint.tensors


def _pieces(tensors: Mapping[str, StoredTensor], dtype: str | None, plan: Plan) -> Iterator[Piece]:
    target = DTYPES[dtype].stored if dtype else None
    for name, stored in tensors.items():
        shape = stored.entry.shape
        scheme = scheme_of_tensor(plan.weights, name, shape)
        if scheme is not None:
            module, sides = name.rpartition(".")[0], (shape[0], shape[1])
            for own, (own_dtype, own_shape) in packed_rows(module, scheme, sides, scale=scale_dtype(plan, dtype)):
                yield Piece(own, own_dtype, stored, own_shape, scheme)
        else:
            is_float = STORED_DTYPES[stored.entry.dtype].is_float
            yield Piece(name, target if target and is_float else stored.entry.dtype, stored, shape)


def scale_dtype(plan: Plan, dtype: str | None) -> str:
    """Return the stored dtype of scales: that of the other weights, or BF16 where they have none of 16 bits."""
    return "F16" if (dtype or plan.profile.dtype) == "fp16" else "BF16"


def _in_file_order(pieces: Iterable[Piece]) -> list[Piece]:
    # Stable: chain order within one size. Whatever would push all after it off the cache lines comes last.
    def key(piece: Piece) -> tuple[bool, int]:
        return piece.size_bytes % DATA_ALIGNMENT != 0, -STORED_DTYPES[piece.dtype].size_bytes

    return sorted(pieces, key=key)


def encode_header(pieces: Collection[Piece], *, metadata: Mapping[str, str]) -> bytes:
    """Return the length prefix and the canonical JSON header, padded with spaces to where the data shall start."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for piece in pieces:
        end = position + piece.size_bytes
        table[piece.name] = {
            "data_offsets": [position, end],
            "dtype": piece.dtype,
            "shape": list(piece.shape),
        }
        position = end
    text = json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    padded = text + b" " * ((_data_offset(pieces) - len(text) - 8) % DATA_ALIGNMENT)
    return len(padded).to_bytes(8, "little") + padded


def _data_offset(pieces: Collection[Piece]) -> int:
    """Return where, modulo `DATA_ALIGNMENT`, most bytes of fp32 tensors keep their source's address modulo 16.

    Only multiples of 8 are kept, as every writer of the format makes them; an odd source gets whole cache lines.
    """
    votes: Counter[int] = Counter({0: 1})
    position = 0
    for piece in pieces:
        if piece.dtype == "F32" and not piece.is_converted:
            votes[(piece.source.entry.begin - position) % VECTOR_BYTES] += piece.size_bytes
        position += piece.size_bytes
    offset = votes.most_common(1)[0][0]
    return offset if offset % 8 == 0 else 0


def dtype_of(stored: Iterable[str]) -> str:
    """Return the short name of the one floating-point dtype among `stored`, or "mixed"."""
    floats = {dtype for dtype in map(STORED_DTYPES.__getitem__, stored) if dtype.is_float}
    return floats.pop().name or "mixed" if len(floats) == 1 else "mixed"
