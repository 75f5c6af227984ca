"""Writes one stage file: source bytes pass through a small ring of buffers, hashed on another thread as they go.

Memory is the ring, whatever the size of the tensors. sha256 and the copy each take about one core, so they overlap.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from exporter.disk.syscalls import start_writeback, write_all
from exporter.layout import Piece, StageLayout
from exporter.packing.packer import Packer
from exporter.sources import Sources
from plans.dtypes import STORED_DTYPES
from plans.reading.digest import BUFFER_BYTES, FileDigest, RunningDigest

NUM_BUFFERS = 4
WRITEBACK_BYTES = 32 << 20
Advance = Callable[[int], None]


@dataclass(slots=True)
class Sink:
    """A stream of bytes into a file and its digest; `fd` None hashes without writing."""

    fd: int | None
    shown: object
    pool: ThreadPoolExecutor
    digest: RunningDigest = field(default_factory=RunningDigest)
    num_overflows: dict[str, int] = field(default_factory=dict)
    """Tensor name -> finite values that became infinite by a change of dtype."""
    _ring: list[memoryview] = field(
        default_factory=lambda: [memoryview(bytearray(BUFFER_BYTES)) for _ in range(NUM_BUFFERS)]
    )
    _pending: "list[Future[None] | None]" = field(default_factory=lambda: [None] * NUM_BUFFERS)
    _turn: int = 0
    _filled: int = 0
    _written: int = 0
    _unsynced: int = 0

    def room(self) -> memoryview:
        """Return the free part of the current buffer, never empty."""
        if self._filled == BUFFER_BYTES:
            self._flush()
        return self._ring[self._turn][self._filled :]

    def commit(self, count: int) -> None:
        """Say that the first `count` bytes of `room()` were filled."""
        self._filled += count

    def put(self, data: bytes | memoryview) -> None:
        """Append bytes that lie in memory."""
        view = memoryview(data)
        while view:
            room = self.room()
            count = min(len(room), len(view))
            room[:count] = view[:count]
            self.commit(count)
            view = view[count:]

    def finish(self) -> FileDigest:
        """Write what is left and return the digest."""
        self._flush()
        for future in self._pending:
            if future is not None:
                future.result()
        return self.digest.result()

    def _flush(self) -> None:
        if not self._filled:
            return
        data = self._ring[self._turn][: self._filled]
        # One hashing thread keeps the updates in order.
        self._pending[self._turn] = self.pool.submit(self.digest.update, data)
        if self.fd is not None:
            write_all(self.fd, data, shown=self.shown)
            self._write_back(len(data))
        self._turn = (self._turn + 1) % NUM_BUFFERS
        self._filled = 0
        busy = self._pending[self._turn]
        if busy is not None:
            busy.result()

    def _write_back(self, count: int) -> None:
        assert self.fd is not None
        self._written += count
        self._unsynced += count
        if self._unsynced >= WRITEBACK_BYTES:
            start_writeback(self.fd, offset=self._written - self._unsynced, size=self._unsynced)
            self._unsynced = 0


def stream_stage(
    layout: StageLayout, *, sources: Sources, sink: Sink, packer: Packer | None = None, advance: Advance
) -> FileDigest:
    """Stream the header and every tensor of a stage through `sink`.

    Args:
        layout: what the file holds.
        sources: the checkpoint's shards.
        sink: where the bytes go.
        packer: what packs weights; None where none are to be packed.
        advance: called with the number of bytes done since the last call.

    Raises:
        IntegrityError: a source changed meanwhile.
        InputError: a weight cannot be packed.
        MachineError: reading or writing failed.
    """
    sink.put(layout.header)
    for piece in layout.pieces:
        if piece.scheme is not None:
            assert packer is not None
            _pack(piece, packer=packer, sink=sink, advance=advance)
        elif piece.is_converted:
            _convert(piece, sources=sources, sink=sink, advance=advance)
        else:
            _copy(piece, sources=sources, sink=sink, advance=advance)
    return sink.finish()


def _copy(piece: Piece, *, sources: Sources, sink: Sink, advance: Advance) -> None:
    offset, end = piece.source.entry.begin, piece.source.entry.end
    while offset < end:
        room = sink.room()
        count = min(len(room), end - offset)
        sources.read(piece.source.file, buffer=room[:count], offset=offset)
        sink.commit(count)
        advance(count)
        offset += count


def _pack(piece: Piece, *, packer: Packer, sink: Sink, advance: Advance) -> None:
    def put(data: bytes | memoryview) -> None:
        sink.put(data)
        advance(len(data))

    packer.stream(piece, put)


def _convert(piece: Piece, *, sources: Sources, sink: Sink, advance: Advance) -> None:
    from exporter.convert import convert_chunk, count_overflows  # imports torch

    entry = piece.source.entry
    width = STORED_DTYPES[entry.dtype].size_bytes
    scratch = memoryview(bytearray(min(BUFFER_BYTES, max(entry.size_bytes, 1))))
    offset = entry.begin
    while offset < entry.end:
        count = min(len(scratch) // width * width, entry.end - offset)
        sources.read(piece.source.file, buffer=scratch[:count], offset=offset)
        data = convert_chunk(scratch[:count], source=entry.dtype, target=piece.dtype)
        overflows = count_overflows(scratch[:count], source=entry.dtype, target=piece.dtype)
        if overflows:
            sink.num_overflows[piece.name] = sink.num_overflows.get(piece.name, 0) + overflows
        sink.put(data)
        advance(len(data))
        offset += count
