"""The driver's side of control: who is there, who failed, and how everybody learns of it.

Every worker has a thread here that listens to it, so that its heartbeats count whatever the driver is computing.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

from plans.errors import ExitCode, LlamaplanError, PeerError
from runtime.distributed.control.acceptor import Acceptor
from runtime.distributed.control.channel import Channel
from runtime.distributed.control.faults import Fault, Faults
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
        faults: why the run cannot go on.
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
        self._identity, self._job, self.names = identity, job, tuple(names)
        self._progress = progress
        self.members: dict[int, Member] = {}
        self.acceptor: Acceptor | None = None
        self.faults = Faults(num_restarts=num_restarts)
        self.epoch = 0
        self.started_at = time.monotonic()
        self.links = LinkWatch(len(self.names), patience=patience, who=self.who)
        self.count_links: Callable[[], LinkCounts | None] = lambda: None
        self._num_requests = 0
        self._changed = self.faults.changed
        self.store = SharedStore(self.broadcast, has_ended=lambda: self.faults.fault is not None or self.faults.is_over)
        Watch(self, patience=patience).start()

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
        self.wait_until(lambda: not self.missing() and all(member.ready for member in self.members.values()))

    def missing(self) -> list[int]:
        """Return the ranks that have not joined."""
        ranks = range(1, len(self.names))
        return [rank for rank in ranks if rank not in self.members or self.members[rank].join is None]

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
        self.faults.is_over = True
        self.broadcast(Finish())
        deadline = time.monotonic() + 5.0
        with self._changed:
            while not all(member.is_finished for member in self.members.values()) and time.monotonic() < deadline:
                self._changed.wait(timeout=0.1)
        self._dismiss(seconds=5.0)

    def abort(self, *, exit_code: int, line: str) -> None:
        """End the run because of an error; every worker is told why."""
        self.faults.is_over = self.faults.is_handled = True
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

    def fail(self, error: LlamaplanError) -> None:
        """End the run for a reason; the first one counts, and everybody is told."""
        if self.faults.record(error):
            self.broadcast(Abort(exit_code=ExitCode.PEER, line=error.line()[:4000]))
            self.faults.events.put(Fault(error))

    def lose(self, member: Member, error: PeerError) -> None:
        """Record that a worker is gone: the end of the run, unless it may be started again."""
        if not self.faults.record_loss(member.rank, error, was_running=member.formed_epoch == self.epoch > 0):
            self.fail(error)

    def replace(self, rank: int) -> None:
        """Make room for a new worker in the place of a lost one."""
        with self._changed:
            member = self.members.pop(rank)
            self.started_at = time.monotonic()
            self.faults.mended()
            self.links.start(None, now=self.started_at)
            self.epoch += 1  # what is still said about the old connections no longer counts
        member.is_replaced = True
        member.channel.close()
        if member.local is not None:
            member.local.end()

    def wait_until(self, is_done: Callable[[], bool]) -> None:
        """Wait for something that the run cannot go on without; errors as `wait_until_loaded`."""
        with self._changed:
            while self.faults.fault is None and self.faults.loss is None and not is_done():
                self._changed.wait(timeout=0.1)
        if self.faults.loss is not None:
            self.fail(self.faults.loss.error)
        self.faults.check()

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
        if not (member.is_finished or member.is_replaced or self.faults.is_over):
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

    def suspect(self, rank: int, peer: int, reason: str) -> None:
        """Note that a data connection broke; if nobody turns out to be gone, that itself is the fault."""
        self.faults.suspect(f"the data connection between {self.who(rank)} and {self.who(peer)} broke: {reason}")

    def _on_put(self, member: Member, entry: Put) -> None:
        self.store.receive(entry)
        for other in list(self.members.values()):
            if other is not member:
                other.channel.try_send(entry)


class Watch:
    """Looks ten times a second for whoever is silent, and says to everybody that this process lives."""

    def __init__(self, team: Team, *, patience: Patience) -> None:
        self._team, self._patience = team, patience
        self._beat_at = 0.0

    def start(self) -> None:
        """Begin, in a thread of its own."""
        threading.Thread(target=self._watch, daemon=True, name="watch").start()

    def _watch(self) -> None:
        woke = time.monotonic()
        while not self._team.faults.is_over:
            time.sleep(0.1)
            slept, woke = time.monotonic() - woke, time.monotonic()
            if slept > self._patience.heartbeat_seconds / 2:
                self._forgive()  # it was this process that stood still
            self._send_beats(woke)
            self._find_faults(woke)
            if self._team.faults.fault is not None and self._team.faults.is_stuck(after_seconds=STUCK_SECONDS):
                self._leave_now(self._team.faults.fault)

    def _forgive(self) -> None:
        self._team.links.forgive()
        for member in list(self._team.members.values()):
            member.channel.last_heard = time.monotonic()

    def _send_beats(self, now: float) -> None:
        if now - self._beat_at >= self._patience.beat_seconds:
            self._beat_at = now
            self._team.broadcast(Beat())

    def _find_faults(self, now: float) -> None:
        limit = self._patience.heartbeat_seconds
        for member in list(self._team.members.values()):
            is_quiet = now - member.channel.last_heard > limit
            if member.join and not member.is_finished and not self._team.faults.is_lost(member.rank) and is_quiet:
                self._team.lose(member, member.silent(limit))
        if now - self._team.started_at > self._patience.join_seconds and (missing := self._team.missing()):
            self._team.fail(self._did_not_join(missing))
        if (counts := self._team.count_links()) is not None:
            self._team.links.hear(0, counts, now=now)
        if self._team.faults.loss is None and (silence := self._team.links.fault(now=now)) is not None:
            self._team.fail(silence)
        if (text := self._team.faults.confirmed_suspicion(after_seconds=BLAME_SECONDS)) is not None:
            self._team.fail(PeerError(text, code="E-LINK"))

    def _leave_now(self, fault: LlamaplanError) -> NoReturn:
        """End the process from outside its main thread, which is deep inside a computation."""
        for member in self._team.members.values():
            if member.local is not None:
                member.local.process.kill()
        sys.stdout.flush()
        sys.stderr.write(f"error[{fault.code}]: {fault.line()}\n")
        sys.stderr.flush()
        os._exit(fault.exit_code)

    def _did_not_join(self, ranks: Iterable[int]) -> PeerError:
        names = ", ".join(self._team.names[rank] for rank in ranks)
        return PeerError(
            f"{names} did not join within {self._patience.join_seconds:.0f} s",
            hint="start it, or give it longer with --join-timeout",
            code="E-JOIN",
        )
