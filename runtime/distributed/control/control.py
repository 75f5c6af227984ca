"""A worker's side of control: it hears the driver, says that it is alive, and ends the process when the run is over.

The main thread computes and may be deep inside an operation or a receive that cannot be cancelled; so it is these
threads that end the process.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from plans.errors import ExitCode, LlamaplanError, PeerError, printable
from runtime.distributed.control.channel import Channel
from runtime.distributed.control.messages import (
    Abort,
    Ask,
    Beat,
    Failed,
    Finish,
    Finished,
    Form,
    LinkCounts,
    Message,
    Numbers,
    Open,
    Progress,
    Put,
    ended_by,
)
from runtime.distributed.control.store import SharedStore
from runtime.steps.parts import Opening

LAST_WORDS_SECONDS = 2.0
"""How long a worker that cannot go on waits for the driver to end the run."""


class Control:
    """The connection to the driver, once it has sent the job.

    Args:
        channel: the connection.
        heartbeat_seconds: silence after which the driver counts as lost.

    Attributes:
        store: how torch.distributed finds its peers.
        form: the newest order to connect, or None before the first.
    """

    def __init__(self, channel: Channel, *, heartbeat_seconds: float) -> None:
        self._channel = channel
        self._heartbeat_seconds = heartbeat_seconds
        self._signal = 0
        self._changed = threading.Condition()
        self._openings: dict[int, Opening] = {}
        self._numbers: Callable[[int], Numbers] | None = None
        self._counts: Callable[[], LinkCounts | None] = lambda: None
        self.form: Form | None = None
        self.store = SharedStore(channel.try_send, has_ended=lambda: False)
        for loop in (self._listen, self._beat):
            threading.Thread(target=loop, daemon=True, name=loop.__name__).start()

    def say(self, message: Message) -> None:
        """Tell the driver something; if it is gone, the listening thread notices."""
        self._channel.try_send(message)

    def progress(self, text: str) -> None:
        """Tell what is being done."""
        self.say(Progress(text=text))

    def answer_with(self, numbers: Callable[[int], Numbers]) -> None:
        """Name what answers when the driver asks for numbers."""
        self._numbers = numbers

    def count_with(self, counts: Callable[[], LinkCounts | None]) -> None:
        """Name what says how far data has come."""
        self._counts = counts

    def wait_for_form(self, *, newer_than: int) -> Form:
        """Return the next order to connect."""
        with self._changed:
            while self.form is None or self.form.epoch <= newer_than:
                self._changed.wait(timeout=0.2)
            return self.form

    def take_opening(self, sequence: int) -> Opening | None:
        """Return what the driver said about a sequence that was not opened here yet; waits for it to arrive."""
        epoch = self.form.epoch if self.form else 0
        with self._changed:
            while sequence not in self._openings:
                if self.form is not None and self.form.epoch != epoch:
                    return None
                self._changed.wait(timeout=0.2)
            return self._openings.pop(sequence)

    def drop_opening(self, sequence: int) -> None:
        """Forget what was said about a sequence that ends before its first step came here."""
        with self._changed:
            self._openings.pop(sequence, None)

    def interrupt(self, number: int) -> None:
        """Leave because of a signal; safe to call from a signal handler."""
        self._signal = number

    def fail(self, error: BaseException) -> NoReturn:
        """Tell the driver why this stage cannot go on, and leave."""
        if not isinstance(error, LlamaplanError):
            reason = "out of memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
            error = PeerError(printable(reason, limit=1000), code="E-WORKER")
        self.say(Failed(exit_code=error.exit_code, code=error.code, line=error.line()[:4000]))
        _complain(f"error[{error.code}]: {error.line()}")
        time.sleep(LAST_WORDS_SECONDS)  # the driver's order to leave comes first
        _leave(error.exit_code)

    def _listen(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self._handle(message)
        except LlamaplanError as error:
            self._lost(error.line())
        self._lost("the driver is gone: its control connection broke")

    def _handle(self, message: Message) -> None:
        match message:
            case Put():
                self.store.receive(message)
            case Ask() if self._numbers is not None:
                self.say(self._numbers(message.request))
            case Finish():
                self.say(Finished())
                _leave(ExitCode.OK)
            case Abort():
                _complain(f"error[E-PEER]: {message.line}")
                _leave(message.exit_code)
        with self._changed:
            if isinstance(message, Form):
                self._openings.clear()
                self.form = message
            elif isinstance(message, Open):
                self._openings[message.opening.sequence] = message.opening
            self._changed.notify_all()

    def _beat(self) -> None:
        beat_at, woke = 0.0, time.monotonic()
        while True:
            time.sleep(0.1)
            slept, woke = time.monotonic() - woke, time.monotonic()
            if slept > self._heartbeat_seconds / 2:
                self._channel.last_heard = woke  # it was this process that stood still
            if woke - beat_at >= min(1.0, self._heartbeat_seconds / 4):
                beat_at = woke
                self.say(Beat(counts=self._counts()))
            if self._signal:
                self.say(ended_by(self._signal))
                _leave(128 + self._signal)
            if woke - self._channel.last_heard > self._heartbeat_seconds:
                self._lost(f"the driver has given no sign of life for {self._heartbeat_seconds:.0f} s")

    def _lost(self, line: str) -> NoReturn:
        _complain(f"error[E-LOST]: {line}")
        _leave(ExitCode.PEER)


def _complain(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")


def _leave(code: int) -> NoReturn:
    """End the process at once: a blocked receive would keep an orderly exit waiting, or abort it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)
