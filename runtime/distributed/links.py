"""The data plane: hidden states to the next stage, token ids from the last stage to the driver.

Point-to-point messages of torch.distributed and nothing else: no collectives, no pickle. A blocked receive of gloo
cannot be cancelled, so breaking the links shuts its sockets down, which wakes it with an error.

A step is one message, and buffers wait for the next ones: gloo sends what nobody has asked for only once both ends have
heard of each other, and every thread on the way waits for a processor that computes.
"""

import contextlib
import os
import queue
import socket
import stat
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d

from plans.errors import PeerError
from runtime.distributed.control.messages import LinkCounts
from runtime.distributed.control.store import SharedStore
from runtime.distributed.header import (
    DTYPE_CODES,
    HEADER_BYTES,
    NUM_WORDS,
    PART_WORDS,
    Header,
    Stamp,
    checksum,
    pack,
    read_table,
    unpack,
    write_table,
)
from runtime.distributed.message import MESSAGE_BYTES, Pieces, pack_pieces, tensor_piece, words_piece
from runtime.steps.parts import Part

FOREVER = timedelta(days=365)
"""An idle chat is no fault. Whoever watches over the run finds the link that is silent; see `control.silence`."""

MAX_WAITING_MESSAGES = 4
"""Messages that a process has asked for before they come, and as many that have come and wait there."""

Expect = Callable[[Header, list[Part]], None]
"""Raises PeerError unless this header, with this table, is what must come next."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A payload and how long it took from its header to its end: no time if it was in the same message."""

    header: Header
    parts: list[Part]
    payload: torch.Tensor
    transfer_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process stands in the chain."""

    rank: int
    num_ranks: int
    address: str
    """Address of this machine for data connections."""
    device: torch.device
    uses_nccl: bool

    @property
    def previous(self) -> int:
        """Rank whose messages arrive here."""
        return (self.rank - 1) % self.num_ranks

    @property
    def next(self) -> int:
        """Rank that gets what is computed here."""
        return (self.rank + 1) % self.num_ranks


@dataclass(frozen=True, slots=True)
class _Sending:
    """A message under way: the step it is, or comes before, and what has to stay until it has arrived."""

    step: int
    tensors: Sequence[torch.Tensor]
    works: Sequence[Any]


class Links:
    """Connections of one epoch, with a thread that receives.

    Args:
        place: this process in the chain.
        store: how the processes find each other.
        stamp: what headers of this run and epoch carry.
        on_linked: told the link, by the rank that sends on it, whenever one is connected.
        expect: checks a header against what must come next, before its payload is received.
        inbox: gets what arrives; if it is bounded and full, the sender has to wait.
        report: told once, with the peer's rank and a sentence, when a connection breaks.
    """

    def __init__(
        self,
        place: Place,
        store: SharedStore,
        *,
        stamp: Stamp,
        on_linked: Callable[[int], None],
        expect: Expect,
        inbox: "queue.Queue[Any]",
        report: Callable[[int, Exception], None],
    ) -> None:
        self._place, self._stamp = place, stamp
        self._expect, self._inbox, self._report = expect, inbox, report
        self._is_broken = threading.Event()
        self._num_sent = self._num_received = self._num_steps = 0
        self._is_waiting = False
        self._ends = _connect(place, c10d.PrefixStore(f"epoch{stamp.epoch}", store), on_linked)
        self._nccl = _nccl(place, c10d.PrefixStore(f"nccl{stamp.epoch}", store)) if place.uses_nccl else None
        self._under_way: deque[_Sending] = deque()
        self._thread = threading.Thread(target=self._receive_all, daemon=True, name="receive")
        self._thread.start()

    def send(self, header: Header, parts: Sequence[Part], payload: torch.Tensor) -> None:
        """Begin to send a payload, in the thread that computed it: another one would have to get the interpreter first.

        The driver sends no step before the answer to the one as many steps ago as there are stages. So a message that
        is older has arrived, and never more than these are under way. Nobody waits for any: gloo forgets to wake
        whoever waits for a message that it was beginning to send when the connection broke.
        """
        tensor = payload.contiguous() if self._nccl else payload.to("cpu").contiguous()
        while self._under_way and self._under_way[0].step <= self._num_steps - self._place.num_ranks:
            self._under_way.popleft()
        try:
            self._under_way.append(self._begin(header, parts, tensor))
        except Exception as error:
            self._tell(self._place.next, error)
        self._num_steps += bool(parts)

    def counts(self) -> LinkCounts:
        """Return how far data has come."""
        return LinkCounts(
            epoch=self._stamp.epoch,
            sent=self._num_sent,
            received=self._num_received,
            received_bytes=sum(map(_received_bytes, self._ends[self._place.previous].connections())),
            is_waiting=self._is_waiting,
        )

    def close(self) -> None:
        """Break every connection and end the thread."""
        self._is_broken.set()
        for end in self._ends.values():
            end.shut_down()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)
        if self._nccl is not None:
            self._nccl.abort()
        for end in self._ends.values():
            end.group = None
        self._nccl = None

    def _put(self, target: "queue.Queue[Any]", item: object) -> None:
        while not self._is_broken.is_set():
            with contextlib.suppress(queue.Full):
                target.put(item, timeout=0.5)
                return

    def _tell(self, peer: int, error: Exception) -> None:
        if not self._is_broken.is_set():
            self._report(peer, error)

    def _begin(self, header: Header, parts: Sequence[Part], payload: torch.Tensor) -> _Sending:
        group = self._ends[self._place.rank].group
        nccl: Any = self._nccl if payload.is_cuda else None
        table = write_table(parts)
        words = pack(replace(header, table=checksum(table)), self._stamp)
        pieces = [words_piece(words), words_piece(table)]
        messages = pack_pieces(pieces if nccl else [*pieces, tensor_piece(payload)])
        self._num_sent += 1
        works = [group.send([message], RECEIVER, min(number, 1)) for number, message in enumerate(messages)]
        if nccl:
            works.append(nccl.send([payload], self._place.next, 1))
        return _Sending(self._num_steps, [*messages, payload], works)

    def _receive_all(self) -> None:
        try:
            coming = deque(self._ask_for(bytearray(MESSAGE_BYTES)) for _ in range(MAX_WAITING_MESSAGES))
            while not self._is_broken.is_set():
                work, buffer = coming.popleft()
                self._wait(work)
                arrival = self._read(Pieces(buffer, receive=self._receive))
                self._num_received += 1
                self._put(self._inbox, arrival)
                buffer[:HEADER_BYTES] = bytes(HEADER_BYTES)  # the next one may be shorter: nothing is read twice
                coming.append(self._ask_for(buffer))
        except Exception as error:  # a thread that ends unheard would leave everybody waiting
            self._tell(self._place.previous, error)

    def _ask_for(self, buffer: bytearray, tag: int = 0) -> tuple[Any, bytearray]:
        tensor = torch.frombuffer(buffer, dtype=torch.uint8)
        return self._ends[self._place.previous].group.recv([tensor], SENDER, tag), buffer

    def _wait(self, work: Any) -> None:
        self._is_waiting = True
        work.wait()
        self._is_waiting = False

    def _receive(self, num_bytes: int) -> bytearray:
        work, buffer = self._ask_for(bytearray(num_bytes), 1)
        self._wait(work)
        return buffer

    def _read(self, pieces: Pieces) -> Arrival:
        header = unpack(pieces.words(NUM_WORDS), self._stamp)
        parts = read_table(header, pieces.words(header.parts * PART_WORDS)) if header.parts else []
        self._expect(header, parts)
        started = time.perf_counter()
        payload = self._read_payload(header, pieces)
        return Arrival(header, parts, payload, time.perf_counter() - started)

    def _read_payload(self, header: Header, pieces: Pieces) -> torch.Tensor:
        dtype, device = TORCH_DTYPES[header.dtype], self._place.device
        if not dtype.is_floating_point or self._nccl is None:
            payload = pieces.tensor(header.shape, dtype)
            return payload.to(device) if dtype.is_floating_point else payload
        payload = torch.empty(header.shape, dtype=dtype, device=device)
        self._wait(self._nccl.recv([payload], self._place.previous, 1))
        return payload


TORCH_DTYPES: dict[int, torch.dtype] = {code: getattr(torch, name) for name, code in DTYPE_CODES.items()}


SENDER, RECEIVER = 0, 1
"""Ranks in the group of one link: data flows in one direction."""


@dataclass(slots=True)
class End:
    """This process's end of one link.

    Attributes:
        group: the group of the link's two processes; None once it is closed.
        sockets: its sockets; gloo shows none of them.
    """

    group: Any
    sockets: set[tuple[int, int]]

    def connections(self) -> Iterator[socket.socket]:
        """Yield a copy of each connected socket that is still there."""
        for descriptor, inode in self.sockets:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as copy:
                is_ours = os.fstat(copy.fileno()).st_ino == inode
                # gloo ends the process if its listening socket fails.
                if is_ours and not copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    yield copy

    def shut_down(self) -> None:
        """Wake whoever waits for it, with an error."""
        for connection in self.connections():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _connect(place: Place, store: c10d.Store, on_linked: Callable[[int], None]) -> dict[int, End]:
    """Connect to both neighbours; returns the ends of the two links by the rank that sends on them.

    Everybody takes the links in the order of the chain, so that nobody waits for somebody who waits for them, and the
    first link that is missing is the one to blame.

    Raises:
        PeerError: a connection was refused.
    """
    gloo: Any = c10d.ProcessGroupGloo
    options = gloo._Options()
    # Bound to one address: by default gloo listens wherever the machine's own name leads.
    options._devices = [gloo.create_device(hostname=place.address)]
    options._timeout = FOREVER
    ends: dict[int, End] = {}
    for link in sorted({place.rank, place.previous}):
        before, role = _sockets(), SENDER if link == place.rank else RECEIVER
        try:
            group = gloo(c10d.PrefixStore(f"link{link}", store), role, 2, options)
        except RuntimeError as error:
            peer = place.next if role == SENDER else place.previous
            raise PeerError(f"no data connection to rank {peer}: {str(error).splitlines()[0]}", code="E-LINK") from None
        ends[link] = End(group, _sockets() - before)
        on_linked(link)
    return ends


def _nccl(place: Place, store: c10d.Store) -> Any:
    nccl: Any = c10d.ProcessGroupNCCL
    torch.cuda.set_device(place.device)
    options = nccl.Options()
    options._timeout = FOREVER
    return nccl(store, place.rank, place.num_ranks, options)


def _sockets() -> set[tuple[int, int]]:
    """Return descriptor and inode of every socket of this process."""
    found = set()
    for name in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            status = os.fstat(int(name.name))
            if stat.S_ISSOCK(status.st_mode):
                found.add((int(name.name), status.st_ino))
    return found


_TCP_INFO = struct.Struct("=8B24I4Q")
"""The beginning of Linux's `struct tcp_info`; its last field here is `tcpi_bytes_received`."""


def _received_bytes(connection: socket.socket) -> int:
    data = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    return int(_TCP_INFO.unpack(data)[-1]) if len(data) == _TCP_INFO.size else 0
