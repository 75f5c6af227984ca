"""The second opinion: an exact method that shares no code with the integer program.

Three dynamic programs find the cheapest chain for an additive time under limits on memory, stages and hops. All other
goals are searches over such limits: the least memory share is the smallest limit under which a chain exists, the least
step period the smallest limit on stages and hops under which a cycle is short enough, and the weighted sum is bounded
from below on every interval of shares. Everything is compared in integers and fractions; nothing is rounded.
"""

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol

from planner.problem.evaluate import share_of, time_of
from planner.problem.goal import Goal
from planner.problem.groups import group_devices
from planner.problem.problem import Assignment, ChainCosts, Problem, Ticks, chain_costs, is_pipelined
from planner.proof import counts as exact_counts
from planner.proof import order as exact_order
from planner.proof import positions as exact_positions
from planner.proof.tables import FOREVER, Clock, Limits, OutOfTimeError

_FINE = Fraction(1, 1 << 24)
"""Bisection stops at this width; from there on, every step goes to the next better chain."""

Found = tuple[Ticks, Assignment]
_Interval = tuple[Fraction, Fraction, Fraction, Ticks]
"""(lower bound on the value, share above, share below, lower bound on the time)."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """The proved optimum (None: there is no plan at all), a plan that has it, and how it was proved."""

    method: str
    value: Fraction | None
    assignment: Assignment | None


class Search(Protocol):
    """A dynamic program over one problem; see `OrderSearch.cheapest`."""

    def cheapest(self, problem: Problem, limits: Limits) -> Found | None:
        """Return the least time and a chain that has it, under limits."""


def method_for(problem: Problem) -> str | None:
    """Return the name of the method that can prove this problem, None where the tables would grow too large."""
    if problem.keep_order:
        return exact_order.METHOD
    groups = group_devices(problem)
    if problem.has_identical_layers:
        return exact_counts.METHOD if exact_counts.num_states(groups) <= exact_counts.MOST_STATES else None
    size = exact_positions.num_states(problem, groups)
    return exact_positions.METHOD if size <= exact_positions.MOST_STATES else None


def certify(problem: Problem, goal: Goal, *, time_limit: float | None = None) -> Certificate | None:
    """Prove the optimum of `goal`.

    Args:
        time_limit: seconds after which to give up.

    Returns:
        The certificate, or None where no exact method reaches (too many unlike devices, or a time that does not add
        up along the chain) or the time was up.
    """
    method = method_for(problem)
    if method is None or is_pipelined(problem, goal.objective):
        return None
    if problem.buses and method != exact_counts.METHOD:
        return _certify_without_buses(problem, goal, time_limit)
    clock = FOREVER if time_limit is None else Clock(time.monotonic() + time_limit)
    try:
        best = _Prover(problem, goal, clock).prove()
    except OutOfTimeError:
        return None
    if best is None:
        return Certificate(method, None, None)
    value = goal.value(time=time_of(problem, best, objective=goal.objective), share=share_of(problem, best))
    return Certificate(method, value, best)


def _certify_without_buses(problem: Problem, goal: Goal, time_limit: float | None) -> Certificate | None:
    """For a method that knows no buses: an optimum without them that they do not slow down is one with them."""
    free = certify(replace(problem, buses=()), goal, time_limit=time_limit)
    if free is None or free.assignment is None:
        return free
    taken = time_of(problem, free.assignment, objective=goal.objective)
    is_kept = goal.max_time is None or taken <= goal.max_time
    value = goal.value(time=taken, share=share_of(problem, free.assignment))
    return free if is_kept and value == free.value else None


def search_for(problem: Problem, costs: ChainCosts, *, clock: Clock = FOREVER) -> Search:
    """Return the dynamic program that `method_for` names."""
    if problem.keep_order:
        return exact_order.OrderSearch(problem, costs, clock)
    if problem.has_identical_layers:
        return exact_counts.CountsSearch(problem, costs, clock)
    return exact_positions.PositionsSearch(problem, costs, clock)


class _Prover:
    """One goal over one problem."""

    def __init__(self, problem: Problem, goal: Goal, clock: Clock) -> None:
        self.problem, self.goal, self.clock = problem, goal, clock
        self.search = search_for(problem, chain_costs(problem, goal.objective), clock=clock)

    def prove(self) -> Assignment | None:
        if self.goal.kind == "time":
            found = self._least_time(self.problem)
            return found[1] if found else None
        if self.goal.kind == "share":
            return self._least_share()
        return self._least_sum()

    def _cheapest(self, problem: Problem, limits: Limits) -> Found | None:
        self.clock.check()
        return self.search.cheapest(problem, limits)

    def _least_time(self, problem: Problem) -> Found | None:
        found = self._cheapest(problem, Limits())
        if found is None or self.goal.objective != "throughput":
            return found
        return self._least_period(problem, found[1])

    def _least_period(self, problem: Problem, start: Assignment) -> Found:
        """Step to the next better chain until there is none, and halve the interval in between.

        `high` always belongs to a chain that was seen, and no chain is at or below `low`.
        """
        best, high, low = start, self._period(start), -1
        while (found := self._within_period(problem, high - 1)) is not None:
            best, high = found, self._period(found)
            middle = (low + high) // 2
            found = self._within_period(problem, middle)
            if found is None:
                low = middle
            else:
                best, high = found, self._period(found)
        return high, best

    def _period(self, chain: Assignment) -> Ticks:
        return time_of(self.problem, chain, objective="throughput")

    def _within_period(self, problem: Problem, period: Ticks) -> Assignment | None:
        """Return a chain whose (scaled) step period is at most `period`."""
        if period < 0:
            return None
        bound = period // self.problem.requests_in_flight
        found = self._cheapest(problem, Limits(stage=bound, hop=bound, bus=bound))
        return found[1] if found and found[0] <= period else None

    def _least_share(self) -> Assignment | None:
        """As `_least_period`, over the limit on the share."""
        ask = self._chain_under_share()
        best = ask(self.problem)
        if best is None:
            return None
        low, high = Fraction(0), share_of(self.problem, best)
        while (found := ask(self.problem.with_share_limit(high, is_strict=True))) is not None:
            best, high = found, share_of(self.problem, found)
            middle = _between(low, high)
            found = ask(self.problem.with_share_limit(middle))
            if found is None:
                low = middle
            else:
                best, high = found, share_of(self.problem, found)
                if isinstance(self.search, exact_counts.CountsSearch):
                    self.search.keep_only(self.problem.with_share_limit(high))
        return best

    def _chain_under_share(self) -> Callable[[Problem], Assignment | None]:
        """Return the question asked of every limit: is there a chain (that is no slower than the first key)?"""
        most = self.goal.max_time
        if most is not None and self.goal.objective == "throughput":
            return lambda problem: self._within_period(problem, most)
        if most is not None and isinstance(self.search, exact_counts.CountsSearch):
            self.search = self.search.narrow(most)

        def ask(problem: Problem) -> Assignment | None:
            found = self._cheapest(problem, Limits())
            return found[1] if found and (most is None or found[0] <= most) else None

        return ask

    def _least_sum(self) -> Assignment | None:
        """Best-first over intervals of shares.

        An interval (low, high) stands for the chains whose share lies strictly between, none of which is faster than
        `time`; so none of them is worth less than weight * time + (1 - weight) * low.
        """
        fastest = self._least_time(self.problem)
        if fastest is None:
            return None
        best, least_share = self._ends(fastest[1])
        best_value = self._value(best)
        intervals: list[_Interval] = []
        self._push(intervals, least_share, share_of(self.problem, fastest[1]), fastest[0])
        while intervals and intervals[0][0] < best_value:
            _bound, low, high, time_bound = heapq.heappop(intervals)
            is_fine = high - low <= _FINE
            limit = high if is_fine else _between(low, high)
            found = self._least_time(self.problem.with_share_limit(limit, is_strict=is_fine))
            if found is not None:
                share, value = share_of(self.problem, found[1]), self._value(found[1])
                if value < best_value:
                    best, best_value = found[1], value
                if share > low:
                    self._push(intervals, low, share, found[0])
            if not is_fine:
                self._push(intervals, limit, high, time_bound)
        return best

    def _ends(self, fastest: Assignment) -> tuple[Assignment, Fraction]:
        """Return the better of the fastest chain and the fastest of the least share, and the least share.

        Afterwards the search leaves out what is too slow to be better than that even at the least share.
        """
        prover = _Prover(self.problem, Goal("share", self.goal.objective), self.clock)
        smallest = prover.prove()
        assert smallest is not None, "a problem that has a chain has a smallest one"
        least_share = share_of(self.problem, smallest)
        found = self._least_time(self.problem.with_share_limit(least_share))
        best = min((fastest, found[1] if found else smallest), key=self._value)
        if isinstance(self.search, exact_counts.CountsSearch) and self.goal.weight and self.goal.best_time:
            # A step period is never below the time of a whole cycle, by which the search counts.
            room = self._value(best) - self.goal.value(time=0, share=least_share)
            self.search = self.search.narrow(int(room * self.goal.best_time / self.goal.weight))
        return best, least_share

    def _push(self, heap: list[_Interval], low: Fraction, high: Fraction, t: Ticks) -> None:
        heapq.heappush(heap, (self.goal.value(time=t, share=low), low, high, t))

    def _value(self, chain: Assignment) -> Fraction:
        return self.goal.value(
            time=time_of(self.problem, chain, objective=self.goal.objective), share=share_of(self.problem, chain)
        )


def _between(low: Fraction, high: Fraction) -> Fraction:
    """Return the middle with a short denominator."""
    return Fraction((low + high) / 2).limit_denominator(1 << 40)
