"""The solver in its own process: stopped when it overstays, replaced when it dies, gone when the session ends."""

import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from planner.answers.settle import minimise, quick_plan
from planner.problem.goal import Goal
from planner.problem.problem import Problem, ProblemDevice, UnitBytes, UnitTicks
from planner.program.session import GRACE_SECONDS, OVERTIME_SECONDS, SolverSession
from planner.proof.certificate import certify
from plans.errors import LlamaplanError, MachineError
from tests.planner.random_problems import random_problem

GOAL = Goal("time", "latency")
SLEEPS = "import time; time.sleep(60)"
DIES = "import os; os.kill(os.getpid(), 9)"
CHATTERS = "import os; os.write(1, b'Welcome to the solver'); os._exit(3)"
SERVES = "from planner.program.session import serve; serve()"


def child(code: str) -> tuple[str, ...]:
    """What starts a solver process that runs `code`."""
    return (sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}")


@pytest.fixture
def problem() -> Problem:
    rng = random.Random(0)
    while True:
        candidate = random_problem(rng, is_plain=True)
        found = certify(candidate, GOAL)
        if found is not None and found.value is not None and candidate.num_devices > 2:
            return candidate


def _wide(num_devices: int, num_layers: int = 40) -> Problem:
    """More unlike devices than any exact method takes, and a hard choice among them."""
    rng = random.Random(6)
    devices = []
    for i in range(num_devices):
        budget = rng.randint(1500, 4500)
        times = UnitTicks(rng.randint(1, 9) * 10**8, (rng.randint(5, 60) * 10**8,) * num_layers, 10**9 + i)
        devices.append(ProblemDevice(f"d{i}", budget, 0, budget, times))
    hop = tuple(
        tuple(None if a == b else rng.randint(1, 40) * 10**8 for b in range(num_devices)) for a in range(num_devices)
    )
    back = tuple(tuple(rng.randint(0, 9) * 10**8 for _ in range(num_devices)) for _ in range(num_devices))
    return Problem(tuple(devices), UnitBytes(700, (1000,) * num_layers, 800), hop, back)


def test_child_answers_as_the_solver_in_this_process_does(problem: Problem) -> None:
    with SolverSession() as apart, SolverSession(is_isolated=False) as here:
        for goal in (GOAL, Goal("share", "latency")):
            assert apart.ask(problem, goal, lambda: 7) == here.ask(problem, goal, lambda: 7)


def test_session_leaves_no_process_behind(problem: Problem) -> None:
    with SolverSession() as session:
        session.ask(problem, GOAL, lambda: None)
        child = session._child
        assert child is not None
        assert Path(f"/proc/{child.pid}").exists() or os.name != "posix"
    assert child.returncode is not None


@pytest.mark.row("L12")
def test_solver_that_ignores_its_limit_is_stopped(problem: Problem) -> None:
    started = time.monotonic()
    with SolverSession(time_limit=0.3, command=child(SLEEPS)) as session:
        answer, other = session.ask(problem, GOAL, lambda: "meanwhile")
    assert time.monotonic() - started < 10  # of the 60 it would sleep
    assert (answer.status, answer.assignment, other) == ("time_limit", None, "meanwhile")


def test_plan_is_still_proved_when_the_solver_hangs(problem: Problem) -> None:
    with SolverSession(time_limit=0.3, command=child(SLEEPS)) as session:
        settled = minimise(problem, GOAL, session=session)
    certificate = certify(problem, GOAL)
    assert certificate is not None
    assert (settled.status, settled.value) == ("optimal", certificate.value)
    assert settled.certified_by == certificate.method


@pytest.mark.row("L10")
def test_out_of_time_without_a_proof_gives_a_feasible_plan() -> None:
    wide = _wide(20)
    started = time.monotonic()
    with SolverSession(time_limit=0.2, command=child(SLEEPS)) as session:
        settled = minimise(wide, GOAL, session=session)
    assert time.monotonic() - started < 10  # of the 60 it would sleep
    assert (settled.status, settled.certified_by) == ("feasible", None)
    assert settled.assignment is not None
    assert settled.bound is None


@pytest.mark.row("L10")
def test_out_of_time_with_nothing_found_says_so() -> None:
    wide = _wide(20)
    no_way_back = tuple((None,) * 20 for _ in range(20))
    with SolverSession(time_limit=0.2, command=child(SLEEPS)) as session:
        settled = minimise(replace(wide, return_hop=no_way_back), GOAL, session=session)
    assert (settled.status, settled.assignment) == ("time_limit", None)


@pytest.mark.row("L11")
@pytest.mark.parametrize("code", [DIES, CHATTERS])
def test_solver_that_dies_is_named(problem: Problem, code: str) -> None:
    with SolverSession(("highs", "cbc"), command=child(code)) as session, pytest.raises(MachineError) as caught:
        session.ask(problem, GOAL, lambda: None)
    assert "solver process" in caught.value.what
    assert ("signal 9" if code == DIES else "code 3") in caught.value.what
    assert caught.value.exit_code == 6


@pytest.mark.row("L11")
def test_missing_highs_falls_back_to_cbc(problem: Problem) -> None:
    code = "import sys; sys.modules['highspy'] = None; " + SERVES
    with SolverSession(command=child(code)) as session:
        answer, _ = session.ask(problem, GOAL, lambda: None)
    assert (answer.status, answer.solver) == ("optimal", "CBC")


def test_no_solver_at_all_is_an_environment_error(problem: Problem) -> None:
    code = "import sys; sys.modules['highspy'] = None; " + SERVES
    with (
        SolverSession(("highs",), command=child(code)) as session,
        pytest.raises(MachineError, match="HiGHS cannot be imported"),
    ):
        session.ask(problem, GOAL, lambda: None)


@pytest.mark.row("L15")
def test_unwritable_temporary_folder_stops_cbc_with_an_environment_error(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    code = "import tempfile; tempfile._get_default_tempdir = lambda: (_ for _ in ()).throw(OSError(30, 'read-only')); "
    code += SERVES
    with SolverSession(("cbc",), command=child(code)) as session, pytest.raises(MachineError, match="CBC failed"):
        session.ask(problem, GOAL, lambda: None)


@pytest.mark.row("L15")
def test_cbc_leaves_no_files_behind(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with SolverSession(("cbc",)) as session:
        answer, _ = session.ask(problem, GOAL, lambda: None)
    assert answer.status == "optimal"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.row("L11")
def test_wrong_certificate_and_wrong_solver_are_both_caught(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.answers import settle

    honest = settle.certify

    def wrong(*args: object, **options: object) -> object:
        found = honest(*args, **options)  # type: ignore[arg-type]
        assert found is not None
        assert found.value is not None
        return replace(found, value=found.value * 2)

    monkeypatch.setattr(settle, "certify", wrong)
    with SolverSession(is_isolated=False) as session, pytest.raises(LlamaplanError) as caught:
        minimise(problem, GOAL, session=session)
    assert caught.value.exit_code == 1
    assert caught.value.code == "E-PROOF"


def test_quick_plan_is_valid_and_never_better_than_the_optimum() -> None:
    rng = random.Random(12)
    for _ in range(25):
        problem = random_problem(rng)
        for goal in (GOAL, Goal("share", "throughput"), Goal("time", "request")):
            best, quick = certify(problem, goal), quick_plan(problem, goal, deadline=time.monotonic() + 60)
            assert best is not None
            if quick is not None:
                assert best.value is not None
                assert quick[1] >= best.value


def test_grace_and_overtime_fit_into_two_seconds() -> None:
    assert GRACE_SECONDS + OVERTIME_SECONDS < 2
