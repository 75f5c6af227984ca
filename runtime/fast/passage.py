"""Many rows on their way through layers: native code from one layer's attention to the next one's, which is torch's.

Shapes: R rows, of one or several sequences; B sequences, S new tokens, E hidden size, H query heads, K key/value heads,
D head size.
"""

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from runtime.fast.cache import FastLayer
from runtime.fast.native import MANY_ROWS, READING_COUNTERS, Layer, Library, Piece, Reading, Shape


class Passage:
    """Rows of one step; to be used by one thread.

    Example:
        >>> passage = Passage(kernels, shape, hidden, (cos, sin), pieces=pieces, capacity=512)  # doctest: +SKIP
        >>> passage.finish(layer, attention(passage.begin(layer)))  # doctest: +SKIP
        >>> hidden = passage.end()  # doctest: +SKIP
    """

    def __init__(
        self,
        library: Library,
        shape: Shape,
        hidden: torch.Tensor,
        tables: Sequence[torch.Tensor],
        *,
        pieces: Sequence[Piece],
        capacity: int,
    ) -> None:
        """Begin.

        Args:
            library: the compiled kernels.
            shape: the layers' sizes; its `rotary_dim` is the tables'.
            hidden: [R, E]; stays as it is.
            tables: cos and sin [R, rotary_dim] of the rows' positions, in the model's dtype.
            pieces: which rows are whose, in order; their `start` does not matter.
            capacity: tokens for which a sequence has room in the cache.
        """
        assert all(table.shape == (len(hidden), shape.rotary_dim) for table in tables)
        assert all(piece.past + piece.num_rows <= capacity for piece in pieces)
        wide = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self._library, self._num_queries = library, shape.num_heads * shape.head_dim
        self._hidden = hidden.clone(memory_format=torch.contiguous_format)
        self._qkv = hidden.new_empty(len(hidden), wide)
        self._tables, self._shape = tables, shape
        threads, most = torch.get_num_threads(), min(len(hidden), MANY_ROWS)
        self._workspace = torch.empty(library.reading_floats(shape, rows=most, threads=threads))
        self._counters = torch.empty(READING_COUNTERS, dtype=torch.int64)
        self._calls = [
            (first, self._call(first, own, threads=threads, capacity=capacity))
            for first, own in _parts(pieces, num_rows=len(hidden))
        ]
        self._finished = 0

    def begin(self, layer: Layer) -> torch.Tensor:
        """Finish the layer before; return the queries [R, H D] of this one, whose keys and values are in the cache."""
        self._run(ctypes.addressof(layer))
        return self._qkv[:, : self._num_queries]

    def finish(self, layer: Layer, attended: torch.Tensor) -> None:
        """Take what a layer's attention has found, [R, H D] in any shape."""
        self._finished, self._attended = ctypes.addressof(layer), attended.contiguous()

    def end(self) -> torch.Tensor:
        """Return the hidden states [R, E] after the last layer."""
        self._run(0)
        return self._hidden

    def _run(self, layer: int) -> None:
        for first, (call, _pieces) in self._calls:
            call.layer, call.next = self._finished, layer
            if self._finished:
                call.attended = self._attended.data_ptr() + first * self._num_queries * self._attended.element_size()
            self._library.read_rows(call)

    def _call(
        self, first: int, pieces: Sequence[Piece], *, threads: int, capacity: int
    ) -> tuple[Reading, "ctypes.Array[Piece]"]:
        """Return the call for some rows from `first` on, and what must live as long."""
        table = (Piece * len(pieces))(*pieces)
        cos, sin = (table[first].data_ptr() for table in self._tables)
        call = Reading(
            openmp=self._library.openmp_address,
            threads=threads,
            rows=sum(piece.num_rows for piece in pieces),
            num_pieces=len(pieces),
            capacity=capacity,
            shape=ctypes.addressof(self._shape),
            hidden=self._hidden[first].data_ptr(),
            qkv=self._qkv[first].data_ptr(),
            cos=cos,
            sin=sin,
            pieces=ctypes.addressof(table),
            workspace=self._workspace.data_ptr(),
            counters=self._counters.data_ptr(),
        )
        return call, table


def attend(attention: Any, queries: torch.Tensor, kept: FastLayer, mask: torch.Tensor | None) -> torch.Tensor:
    """Let queries [B, S, H, D] look back on a layer's cache, their own tokens included; returns [B, S, H, D]."""
    run: Any = sdpa_attention_forward
    found, _ = run(attention, queries.transpose(1, 2), kept.keys, kept.values, mask, scaling=attention.scaling)
    result: torch.Tensor = found
    return result


def _parts(pieces: Sequence[Piece], *, num_rows: int) -> Iterator[tuple[int, list[Piece]]]:
    """Yield the first of every MANY_ROWS rows, and the pieces among them."""
    for first in range(0, num_rows, MANY_ROWS):
        inside = []
        for piece in pieces:
            begin, end = max(piece.first_row, first), min(piece.first_row + piece.num_rows, first + MANY_ROWS)
            if begin < end:
                past = piece.past + begin - piece.first_row
                inside.append(Piece(sequence=piece.sequence, first_row=begin - first, num_rows=end - begin, past=past))
        yield first, inside
