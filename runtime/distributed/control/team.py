"""The driver's side of control: who is there, who failed, and how everybody learns of it.

Every worker has a thread here that listens to it, so that its heartbeats count whatever the driver is computing.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from plans.errors import ExitCode, LlamaplanError, PeerError
from runtime.distributed.control.acceptor import Acceptor
from runtime.distributed.control.channel import Channel
from runtime.distributed.control.identity import check_identity
from runtime.distributed.control.members import LocalProcess, Member, error_of
from runtime.distributed.control.messages import (
    ENDED,
    Abort,
    Ask,
    Beat,
    Broken,
    Failed,
    Finish,
    Finished,
    Form,
    Formed,
    Identity,
    Job,
    Join,
    LinkCounts,
    Linked,
    Message,
    Numbers,
    Progress,
    Put,
    Ready,
    Refused,
)
from runtime.distributed.control.silence import LinkWatch, Patience
from runtime.distributed.control.store import SharedStore

BLAME_SECONDS = 1.0
"""How long a broken data connection waits for the news of whose fault it was."""

STUCK_SECONDS = 1.5
"""How long the main thread may take to notice a fault before the process is ended around it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Put into the event queue when the run cannot go on."""

    error: LlamaplanError


@dataclass(frozen=True, slots=True)
class Loss:
    """Put into the event queue when a worker is gone that will be started again."""

    rank: int
    error: PeerError


class Team:
    """All workers of a run.

    Args:
        identity: what every worker must have been given.
        job: what a worker is told when it joins, by rank.
        names: what each stage is called, by rank; rank 0 is this process.
        patience: how long to wait for what.
        progress: told what the workers are doing.
        num_restarts: how many lost workers may be started again.

    Attributes:
        names: what each stage is called.
        members: the workers, by rank.
        acceptor: takes connections of workers from elsewhere, if there can be any.
        links: finds the link that is silent.
        count_links: says how far this process's own data has come, once it is connected.
        store: how torch.distributed finds its peers.
        fault: why the run cannot go on.
        loss: the worker that has to be started again before it can go on.
        events: gets a `Fault` or a `Loss` when the run cannot go on, and whatever else the driver waits for.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        job: Callable[[int], Job],
        names: Iterable[str],
        patience: Patience,
        progress: Callable[[str], None],
        num_restarts: int = 0,
    ) -> None:
        self._num_restarts = num_restarts
        self._identity, self._job, self.names = identity, job, tuple(names)
        self._patience, self._progress = patience, progress
        self.members: dict[int, Member] = {}
        self.acceptor: Acceptor | None = None
        self.events: queue.Queue[Any] = queue.Queue()
        self.fault: LlamaplanError | None = None
        self.loss: Loss | None = None
        self.epoch = 0
        self._fault_at = self._beat_at = 0.0
        self._started_at = time.monotonic()
        self._is_handled = False
        self._is_over = False
        self._suspicion: tuple[float, str] | None = None
        self.links = LinkWatch(len(self.names), patience=patience, who=self.who)
        self.count_links: Callable[[], LinkCounts | None] = lambda: None
        self._num_requests = 0
        self._changed = threading.Condition()
        self.store = SharedStore(self.broadcast, has_ended=lambda: self.fault is not None or self._is_over)
        threading.Thread(target=self._watch, daemon=True, name="watch").start()

    # --- joining ---------------------------------------------------------------------------------------------------

    def adopt(self, rank: int, channel: Channel, local: LocalProcess) -> None:
        """Take in a worker that this process starts; it still has to say that it is there."""
        member = Member(rank, self.names[rank], channel, local)
        self.members[rank] = member
        threading.Thread(target=self._listen, args=(member,), daemon=True, name=f"listen {rank}").start()

    def admit(self, channel: Channel) -> None:
        """Talk with a process that connected and proved its key; returns when it leaves."""
        join = channel.receive()
        if not isinstance(join, Join):
            channel.close()
            return
        with self._changed:
            refusal = self._refusal(join)
            if refusal is None:
                member = Member(join.rank, self.names[join.rank], channel)
                self.members[join.rank] = member
        if refusal is not None:
            channel.try_send(Refused(exit_code=refusal.exit_code, line=refusal.line()))
            channel.close()
            return
        channel.set_timeout(None)
        self._listen(member, join)

    def _refusal(self, join: Join) -> LlamaplanError | None:
        count = len(self.names)
        if not 1 <= join.rank < count:
            return PeerError(f"there is no rank {join.rank} for a worker", expected=f"1 to {count - 1}", code="E-RANK")
        if join.rank in self.members:
            taken = self.members[join.rank].who
            return PeerError(f"rank {join.rank} is taken by {taken}; one process per stage", code="E-RANK")
        return None

    def wait_until_loaded(self) -> None:
        """Wait until every worker is there and has loaded its stage.

        Raises:
            PeerError: one did not join in time, or was lost.
            LlamaplanError: whatever a worker failed with.
        """
        self.wait_until(lambda: not self._missing() and all(member.ready for member in self.members.values()))

    def _missing(self) -> list[int]:
        ranks = range(1, len(self.names))
        return [rank for rank in ranks if rank not in self.members or self.members[rank].join is None]

    def _did_not_join(self, ranks: Iterable[int]) -> PeerError:
        return PeerError(
            f"{', '.join(self.names[rank] for rank in ranks)} did not join within {self._patience.join_seconds:.0f} s",
            hint="start it, or give it longer with --join-timeout",
            code="E-JOIN",
        )

    # --- talking ---------------------------------------------------------------------------------------------------

    def who(self, rank: int) -> str:
        """Return what a process is called, with all that is known of it."""
        return self.members[rank].who if rank in self.members else self.names[rank]

    def broadcast(self, message: Message) -> None:
        """Send to everybody who has joined."""
        for member in list(self.members.values()):
            if member.join is not None:
                member.channel.try_send(message)

    def form(self, *, uses_nccl: bool) -> int:
        """Tell everybody to connect to their neighbours; returns the epoch the connections belong to."""
        self.epoch += 1
        self.links.start(self.epoch, now=time.monotonic())
        self.broadcast(Form(epoch=self.epoch, uses_nccl=uses_nccl))
        return self.epoch

    def wait_until_formed(self) -> None:
        """Wait until every worker is connected to its neighbours; errors as `wait_until_loaded`."""
        self.wait_until(lambda: all(member.formed_epoch == self.epoch for member in self.members.values()))
        self.links.connected()

    def numbers(self) -> list[Numbers]:
        """Ask every worker for its numbers, in chain order; errors as `wait_until_loaded`."""
        self._num_requests += 1
        request = self._num_requests
        self.broadcast(Ask(request=request))
        self.wait_until(lambda: all(m.numbers and m.numbers.request == request for m in self.members.values()))
        return [m.numbers for _, m in sorted(self.members.items()) if m.numbers is not None]

    def finish(self) -> None:
        """End the run in order: every worker acknowledges before anything is closed."""
        self._is_over = True
        self.broadcast(Finish())
        deadline = time.monotonic() + 5.0
        with self._changed:
            while not all(member.is_finished for member in self.members.values()) and time.monotonic() < deadline:
                self._changed.wait(timeout=0.1)
        self._dismiss(seconds=5.0)

    def abort(self, *, exit_code: int, line: str) -> None:
        """End the run because of an error; every worker is told why."""
        self._is_over = self._is_handled = True
        self.broadcast(Abort(exit_code=exit_code, line=line[:4000]))
        self._dismiss(seconds=0.5)

    def _dismiss(self, *, seconds: float) -> None:
        local = [member.local for member in self.members.values() if member.local is not None]
        deadline = time.monotonic() + seconds
        while any(worker.process.poll() is None for worker in local) and time.monotonic() < deadline:
            time.sleep(0.01)
        for worker in local:
            worker.end()
        if self.acceptor is not None:
            self.acceptor.close()
        for member in self.members.values():
            member.channel.close()

    # --- faults ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise the fault of the run, if there is one."""
        if self.fault is not None:
            self._is_handled = True
            raise self.fault

    def fail(self, error: LlamaplanError) -> None:
        """Record why the run cannot go on; the first reason counts."""
        with self._changed:
            if self.fault is not None or self._is_over:
                return
            self.fault, self._fault_at = error, time.monotonic()
            self._changed.notify_all()
        self.broadcast(Abort(exit_code=ExitCode.PEER, line=error.line()[:4000]))
        self.events.put(Fault(error))

    def lose(self, member: Member, error: PeerError) -> None:
        """Record that a worker is gone: the end of the run, unless it may be started again."""
        with self._changed:
            may_restart = self._num_restarts > 0 and member.formed_epoch == self.epoch > 0 and self.loss is None
            if may_restart and self.fault is None and not self._is_over:
                self._num_restarts -= 1
                self.loss = Loss(member.rank, error)
        if self.loss is not None and self.loss.error is error:
            self.events.put(self.loss)
        else:
            self.fail(error)

    def replace(self, rank: int) -> None:
        """Make room for a new worker in the place of a lost one."""
        with self._changed:
            member = self.members.pop(rank)
            self._started_at, self._suspicion, self.loss = time.monotonic(), None, None
            self.links.start(None, now=self._started_at)
            self.epoch += 1  # what is still said about the old connections no longer counts
        member.is_replaced = True
        member.channel.close()
        if member.local is not None:
            member.local.end()

    def suspect(self, rank: int, peer: int, reason: str) -> None:
        """Note that a data connection broke; if nobody turns out to be gone, that itself is the fault."""
        text = f"the data connection between {self.who(rank)} and {self.who(peer)} broke: {reason}"
        with self._changed:
            self._suspicion = self._suspicion or (time.monotonic(), text)

    def wait_until(self, is_done: Callable[[], bool]) -> None:
        """Wait for something that the run cannot go on without; errors as `wait_until_loaded`."""
        with self._changed:
            while self.fault is None and self.loss is None and not is_done():
                self._changed.wait(timeout=0.1)
        if self.loss is not None:
            self.fail(self.loss.error)
        self.check()

    # --- threads ---------------------------------------------------------------------------------------------------

    def _listen(self, member: Member, first: Message | None = None) -> None:
        try:
            message = first or member.channel.receive()
            while message is not None:
                self._handle(member, message)
                with self._changed:
                    self._changed.notify_all()
                message = member.channel.receive()
        except LlamaplanError as error:
            self.fail(error)
            return
        except OSError:
            pass  # as good as the end of the stream
        if not (member.is_finished or member.is_replaced or self._is_over):
            self.lose(member, member.ended())

    def _handle(self, member: Member, message: Message) -> None:
        match message:
            case Join():
                self._on_join(member, message)
            case Progress():
                self._progress(f"{member.name}: {message.text}")
            case Ready():
                member.ready = message
            case Put():
                self._on_put(member, message)
            case Beat() if message.counts is not None:
                self.links.hear(member.rank, message.counts, now=time.monotonic())
            case Linked():
                self.links.linked(member.rank, message.link, epoch=message.epoch)
            case Formed():
                member.formed_epoch = message.epoch
            case Numbers():
                member.numbers = message
            case Failed() if message.code == ENDED:
                member.farewell = message.line  # its connection ends next
            case Failed():
                self.fail(error_of(message, who=member.who, is_running=self.epoch > 0))
            case Broken() if message.epoch == self.epoch:
                self.suspect(member.rank, message.peer, message.text)
            case Finished():
                member.is_finished = True

    def _on_join(self, member: Member, join: Join) -> None:
        try:
            check_identity(self._identity, join.identity, who=f"{member.name} on {join.host}")
        except PeerError as error:
            member.channel.try_send(Refused(exit_code=error.exit_code, line=error.line()))
            raise
        member.channel.send(self._job(join.rank))
        member.join = join

    def _on_put(self, member: Member, entry: Put) -> None:
        self.store.receive(entry)
        for other in list(self.members.values()):
            if other is not member:
                other.channel.try_send(entry)

    def _watch(self) -> None:
        woke = time.monotonic()
        while not self._is_over:
            time.sleep(0.1)
            slept, woke = time.monotonic() - woke, time.monotonic()
            if slept > self._patience.heartbeat_seconds / 2:
                self._forgive()  # it was this process that stood still
            self._send_beats(woke)
            self._find_faults(woke)
            if self.fault is not None and not self._is_handled and woke - self._fault_at > STUCK_SECONDS:
                self._leave_now(self.fault)

    def _forgive(self) -> None:
        self.links.forgive()
        for member in list(self.members.values()):
            member.channel.last_heard = time.monotonic()

    def _send_beats(self, now: float) -> None:
        if now - self._beat_at >= self._patience.beat_seconds:
            self._beat_at = now
            self.broadcast(Beat())

    def _find_faults(self, now: float) -> None:
        limit = self._patience.heartbeat_seconds
        for member in list(self.members.values()):
            is_lost = self.loss is not None and self.loss.rank == member.rank
            if member.join and not member.is_finished and not is_lost and now - member.channel.last_heard > limit:
                self.lose(member, member.silent(limit))
        if now - self._started_at > self._patience.join_seconds and (missing := self._missing()):
            self.fail(self._did_not_join(missing))
        if (counts := self.count_links()) is not None:
            self.links.hear(0, counts, now=now)
        if self.loss is None and (silence := self.links.fault(now=now)) is not None:
            self.fail(silence)
        suspicion = self._suspicion
        if suspicion is not None and self.loss is None and now - suspicion[0] > BLAME_SECONDS:
            self.fail(PeerError(suspicion[1], code="E-LINK"))

    def _leave_now(self, fault: LlamaplanError) -> NoReturn:
        """End the process from outside its main thread, which is deep inside a computation."""
        for member in self.members.values():
            if member.local is not None:
                member.local.process.kill()
        sys.stdout.flush()
        sys.stderr.write(f"error[{fault.code}]: {fault.line()}\n")
        sys.stderr.flush()
        os._exit(fault.exit_code)
