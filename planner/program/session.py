"""The solver in a process of its own, so that it can be stopped from outside and its crash is not ours.

A solver that ignores its time limit is killed one second after it; memory it loses, a segmentation fault or garbage on
stdout stay over there. The child is started once per session, in parallel to building the problem, and answers one
question at a time: pickled over its stdin and stdout, which it first moves out of reach of the solver's own printing.
"""

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import IO, Any, Self, TypeVar

from planner.problem.goal import Goal, IlpAnswer, SolverFault, SolverName
from planner.problem.problem import Problem
from plans.commands.children import python_command
from plans.errors import LlamaplanError, MachineError

GRACE_SECONDS = 1.0
"""How long after the limit the solver may still be tidying up."""
OVERTIME_SECONDS = 0.7
"""What a makeshift plan may take after that; all together stays below two seconds."""
PATIENCE_SECONDS = 10.0
"""How long the solver may go on when the answer is already proved by other means."""


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Task:
    """What the child is asked; the arguments of `planner.program.solve.solve_ilp`."""

    problem: Problem
    goal: Goal
    solvers: tuple[SolverName, ...]
    mip_gap: float
    time_limit: float | None
    is_second_opinion: bool


@dataclass(slots=True)
class SolverSession:
    """Answers questions until the time is up; use it in a `with` block.

    Args:
        solvers: which to use, in this order; later ones only where earlier ones fail.
        mip_gap: relative gap at which a solver may stop.
        time_limit: seconds for all questions together, from the start of the session.
        is_isolated: False solves in this process: no start-up cost, but also nobody to stop the solver.
        command: what starts the child; tests put misbehaving ones here.
    """

    solvers: tuple[SolverName, ...] = ("highs", "cbc")
    mip_gap: float = 0.0
    time_limit: float | None = None
    is_isolated: bool = True
    command: Sequence[str] = field(default_factory=lambda: python_command("planner.program.session"))
    _child: "subprocess.Popen[bytes] | None" = None
    _started: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Self:
        if self.is_isolated:
            self._child = _start(self.command)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the time is up, 0 when it is; None without a limit."""
        if self.time_limit is None:
            return None
        return max(0.0, self._started + self.time_limit - time.monotonic())

    @property
    def overtime_deadline(self) -> float:
        """Until when, on the monotonic clock, a makeshift plan may be looked for: a little beyond the time limit."""
        soon = time.monotonic() + OVERTIME_SECONDS
        if self.time_limit is None:
            return soon
        return min(soon, self._started + self.time_limit + GRACE_SECONDS + OVERTIME_SECONDS)

    def ask(
        self, problem: Problem, goal: Goal, meanwhile: Callable[[], T], *, is_second_opinion: bool = False
    ) -> tuple[IlpAnswer, T]:
        """Minimise `goal` over `problem` (see `planner.program.solve`) and do something else at the same time.

        Once that has a result that is not None, the solver gets `PATIENCE_SECONDS` more.

        Raises:
            MachineError: no solver works here.
        """
        for index in range(len(self.solvers)):
            solvers = self.solvers[index:]
            question = _Task(problem, goal, solvers, self.mip_gap, self.seconds_left, is_second_opinion)
            try:
                reply, other = self._exchange(question, meanwhile)
            except _ChildLostError as lost:
                if index + 1 == len(self.solvers):
                    raise _crash(solvers[0], lost.exit_code) from None
                continue
            return _unwrap(reply, solvers), other
        raise AssertionError("a session has at least one solver")

    def _exchange(self, question: _Task, meanwhile: Callable[[], T]) -> tuple[object, T]:
        limit = question.time_limit
        if limit is not None and limit <= 0:
            return _no_answer(question.solvers[0]), meanwhile()
        if not self.is_isolated:
            return _answer(question), meanwhile()
        if self._child is None or self._child.poll() is not None:
            self._child = _start(self.command)
        deadline = None if limit is None else time.monotonic() + limit + GRACE_SECONDS
        try:
            _send_aside(self._child.stdin, pickle.dumps(question))
            other = meanwhile()
            if other is not None:
                patience = time.monotonic() + PATIENCE_SECONDS
                deadline = patience if deadline is None else min(deadline, patience)
            return _receive(self._child.stdout, deadline), other
        except TimeoutError:
            self._stop()
            return _no_answer(question.solvers[0]), other
        except (EOFError, BrokenPipeError, pickle.UnpicklingError, ValueError):
            raise _ChildLostError(self._stop()) from None

    def _stop(self) -> int:
        """End the child and whatever it started; return its exit code."""
        child, self._child = self._child, None
        if child is None:
            return 0
        try:
            code = child.poll()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            return child.wait() if code is None else code
        finally:
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


class _ChildLostError(Exception):
    """The child ended, or said something that is no answer."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(exit_code)


def _start(command: Sequence[str]) -> "subprocess.Popen[bytes]":
    try:
        # A session of its own: Ctrl-C reaches us alone, and CBC, a grandchild, can be killed with it.
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    except OSError as error:
        raise MachineError(
            f"cannot start the solver process: {error.strerror} (errno {error.errno})", where=command[0]
        ) from None


def _send(pipe: IO[bytes] | None, data: bytes) -> None:
    assert pipe is not None
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def _send_aside(pipe: IO[bytes] | None, data: bytes) -> None:
    """Send from a thread: the child may not be reading yet, or never will."""

    def send() -> None:
        with contextlib.suppress(OSError, ValueError):  # whoever waits for the reply sees that the child is gone
            _send(pipe, data)

    threading.Thread(target=send, daemon=True).start()


def _receive(pipe: IO[bytes] | None, deadline: float | None) -> Any:
    """Read one pickled reply of our own child.

    Raises:
        TimeoutError: nothing complete arrived in time.
        EOFError: the child ended.
    """
    assert pipe is not None
    size = int.from_bytes(_read(pipe.fileno(), 8, deadline), "little")
    return pickle.loads(_read(pipe.fileno(), size, deadline))


def _read(fd: int, size: int, deadline: float | None) -> bytes:
    data = b""
    while len(data) < size:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([fd], [], [], left)[0]:
            raise TimeoutError
        part = os.read(fd, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return data


def _unwrap(reply: object, solvers: Sequence[str]) -> IlpAnswer:
    if isinstance(reply, SolverFault) and reply.is_wrong:
        raise LlamaplanError(
            f"no solver gave an answer that holds ({reply.text})", hint="this is a bug of ours; please report it"
        )
    if isinstance(reply, SolverFault):
        raise MachineError(
            f"no solver works here ({reply.text})",
            hint=f"reinstall highspy and pulp, or choose another with --solver (tried {', '.join(solvers)})",
            code="E-SOLVER",
        )
    assert isinstance(reply, IlpAnswer)
    return reply


def _crash(solver: str, code: int) -> MachineError:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return MachineError(
        f"the solver process ({sys.executable}, {solver}) {how}",
        hint="free some memory, or try another solver with --solver",
        code="E-SOLVER",
    )


def _no_answer(solver: "SolverName") -> IlpAnswer:
    package, name = ("highspy", "HiGHS") if solver == "highs" else ("pulp", "CBC")
    try:
        known = version(package)
    except PackageNotFoundError:
        known = "unknown"
    return IlpAnswer("time_limit", name, known)


def _answer(question: _Task) -> IlpAnswer | SolverFault:
    from planner.program.solve import SolverFaultError, solve_ilp

    try:
        return solve_ilp(
            question.problem,
            question.goal,
            solvers=question.solvers,
            mip_gap=question.mip_gap,
            time_limit=question.time_limit,
            is_second_opinion=question.is_second_opinion,
        )
    except SolverFaultError as fault:
        return SolverFault(str(fault), is_wrong=fault.is_wrong)


def serve() -> None:
    """Answer questions on stdin until it closes; what the child process runs."""
    _die_with_parent()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # solvers print banners whatever they are told
    questions = sys.stdin.buffer
    import planner.program.solve  # noqa: F401  # loaded while the parent still builds the problem

    while len(head := questions.read(8)) == 8:
        question = pickle.loads(questions.read(int.from_bytes(head, "little")))
        _send(replies, pickle.dumps(_answer(question)))


def _die_with_parent() -> None:
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    serve()
