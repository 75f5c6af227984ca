"""What a search may cost: which solvers, how long, how close to the optimum."""

from dataclasses import dataclass

from planner.problem.goal import SolverName
from planner.program.session import SolverSession


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to look for an answer."""

    solvers: tuple[SolverName, ...] = ("highs", "cbc")
    """HiGHS, then CBC where it fails."""
    time_limit: float | None = 60.0
    """Seconds for everything; None for no limit."""
    mip_gap: float = 0.0
    """Relative gap at which the solver may stop; 0 proves the optimum."""
    is_isolated: bool = True
    """False runs the solver in this process, where nobody can stop it."""

    def session(self) -> SolverSession:
        """Return a session whose time starts now."""
        return SolverSession(
            self.solvers, mip_gap=self.mip_gap, time_limit=self.time_limit, is_isolated=self.is_isolated
        )


USUAL = Effort()
