"""The stops of a chain - stage, link, stage, ..., the way back - and how long a step of any length stays at each.

A message between two hosts occupies the link between them, which hops of the same chain may share; a hop inside a host,
and one over a link that is stated between the two devices themselves, has a link of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from planner.simulate.one_plan import EventKind
from planner.timing.costs import CostModel
from planner.timing.roofline import Work
from planner.timing.unit_times import UnitTimes
from plans.errors import InfeasibleError
from plans.stages import StageRange


@dataclass(frozen=True, slots=True)
class Stop:
    """What a step occupies on its way; stops of the same resource wait for each other."""

    kind: EventKind
    resource: str
    bus: str | None = None
    """The host whose memory bus a stage shares with others."""


class Chain:
    """The stops of a plan's chain and their times, by the same cost model that made the plan.

    Args:
        model: devices, links and the batch size; the lengths of its workload do not matter here.
        stages: the chain in order.

    Raises:
        InfeasibleError: two neighbours, or the last stage and the first, are not connected.
    """

    def __init__(self, model: CostModel, *, stages: Sequence[StageRange]) -> None:
        self._model = model
        self._units = [stage.units(model.profile) for stage in stages]
        self._names = [stage.device for stage in stages]
        self._times = [
            UnitTimes(model.cluster.device(name), profile=model.profile, workload=model.workload)
            for name in self._names
        ]
        self.stops = tuple(self._all_stops())

    def decode_seconds(self, context: int) -> list[float]:
        """Return the time of one decode step over `context` tokens at every stop."""
        stages = [
            math.fsum(times.decode(unit, context=context).seconds for unit in units)
            for times, units in zip(self._times, self._units, strict=True)
        ]
        hops = [self._model.decode_hop_seconds(a, b) for a, b in pairwise(self._names)]
        return _interleave(stages, [*hops, self._return_seconds()])

    def chunk_seconds(self, tokens: int, past: int, *, is_last: bool) -> list[float]:
        """Return the time of one prefill chunk at every stop; the head works on the last one alone."""
        stages = [
            math.fsum(
                times.prefill(unit, tokens=tokens, past=past).seconds
                for unit in units
                if is_last or unit.kind != "head"
            )
            for times, units in zip(self._times, self._units, strict=True)
        ]
        hops = [self._model.prefill_hop_seconds(a, b, tokens) for a, b in pairwise(self._names)]
        return _interleave(stages, [*hops, self._return_seconds() if is_last else 0.0])

    def decode_bus_seconds(self, context: int) -> list[float]:
        """Return how long a decode step over `context` tokens keeps the memory bus busy at every stop."""
        work = Work(1, context - 1, self._model.workload.batch_size)
        return self._bus_seconds(work, has_head=True)

    def chunk_bus_seconds(self, tokens: int, past: int, *, is_last: bool) -> list[float]:
        """Return how long a prefill chunk keeps the memory bus busy at every stop."""
        return self._bus_seconds(Work(tokens, past, self._model.workload.batch_size), has_head=is_last)

    def _bus_seconds(self, work: Work, *, has_head: bool) -> list[float]:
        stages = [
            math.fsum(
                self._model.bus_seconds(unit, bus, work=work) for unit in units if has_head or unit.kind != "head"
            )
            if (bus := self._bus(name)) is not None
            else 0.0
            for name, units in zip(self._names, self._units, strict=True)
        ]
        return _interleave(stages, [0.0] * len(stages))

    def _bus(self, device: str) -> str | None:
        return next((host for host, names in self._model.buses.items() if device in names), None)

    def _return_seconds(self) -> float:
        return self._model.return_hop_seconds(self._names[-1], self._names[0])

    def _all_stops(self) -> list[Stop]:
        ways = [*pairwise(self._names), (self._names[-1], self._names[0])]
        for a, b in ways:
            if math.isinf(self._model.hop_seconds(a, b, 1)):
                raise InfeasibleError(self._model.topology.explain(a, b), code="E-LINK")
        stops = []
        for index, (a, b) in enumerate(ways):
            stops.append(Stop("decode", a, bus=self._bus(a)))
            stops.append(Stop("hop" if index + 1 < len(ways) else "return", self._link(a, b)))
        return stops

    def _link(self, a: str, b: str) -> str:
        cluster = self._model.cluster
        hosts = cluster.device(a).host, cluster.device(b).host
        has_own = any({link.from_, link.to} == {a, b} for link in cluster.links)
        return f"{a} -> {b}" if has_own or hosts[0] == hosts[1] else f"{hosts[0]} -> {hosts[1]}"


def _interleave(stages: Sequence[float], hops: Sequence[float]) -> list[float]:
    return [seconds for pair in zip(stages, hops, strict=True) for seconds in pair]
