"""Profile + workload + cluster -> the partition problem, through the cost model."""

import math
from collections.abc import Iterable, Mapping
from functools import cache

from planner.problem.problem import Bus, Matrix, Problem, ProblemDevice, Rule, Ticks, UnitBytes, UnitTicks
from planner.timing.costs import CostModel
from plans.cluster import Cluster
from plans.memory import (
    device_overhead_bytes,
    end_activation_bytes,
    layer_activation_bytes,
    layer_kv_bytes,
    tied_table_bytes,
)
from plans.plan import Execution
from plans.profile import ModelProfile, UnitProfile
from plans.workload import Workload

FINEST_TICK_SECONDS = 1e-12
_MOST_TICKS = 2**55
"""Sums of this size are far from overflowing 64 bits in the certificate."""


def build_problem(
    profile: ModelProfile,
    *,
    workload: Workload,
    cluster: Cluster,
    execution: Execution = "one_process",
    rules: Mapping[str, Rule] | None = None,
    keep_order: bool = False,
    use_all: bool = False,
) -> Problem:
    """Return the partition problem in integers.

    Args:
        profile: the model.
        workload: what is asked of it.
        cluster: devices with budgets, and links.
        execution: where the stages run.
        rules: what is demanded of single devices, by name.
        keep_order: stages follow the order in which the devices are listed.
        use_all: every device gets a stage.
    """
    costs = CostModel(profile, workload=workload, cluster=cluster, execution=execution)
    seconds = _Seconds(costs)
    tick = seconds.tick(workload)
    is_process_per_stage = execution == "process_per_stage"
    devices = tuple(
        ProblemDevice(
            name=device.name,
            budget_bytes=max(device.budget_bytes or 0, 1),
            overhead_bytes=device_overhead_bytes(device, cluster, is_process_per_stage=is_process_per_stage),
            limit_bytes=device.budget_bytes or 0,
            decode=seconds.decode(device.name, tick),
            prefill=seconds.prefill(device.name, tick),
            rule=(rules or {}).get(device.name, Rule()),
        )
        for device in cluster.devices
    )
    return Problem(
        devices=devices,
        units=unit_bytes(profile, workload),
        decode_hop=seconds.matrix(costs.decode_hop_seconds, tick),
        return_hop=seconds.matrix(costs.return_hop_seconds, tick, is_to_itself=True),
        prefill_hop=seconds.prefill_hops(tick),
        new_tokens=workload.new_tokens,
        requests_in_flight=workload.requests_in_flight,
        execution=execution,
        keep_order=keep_order,
        use_all=use_all,
        tick_seconds=tick,
        buses=seconds.buses(tick),
    )


def unit_bytes(profile: ModelProfile, workload: Workload) -> UnitBytes:
    """Return what every unit needs, by the formulas of `plans.memory`."""
    return UnitBytes(
        embedding=profile.embedding.weight_bytes,
        layers=tuple(layer.weight_bytes + layer_kv_bytes(layer, workload) for layer in profile.layers),
        head=profile.head.weight_bytes,
        shared=tied_table_bytes(profile),
        embedding_activation=end_activation_bytes(profile, workload, has_head=False),
        layer_activation=layer_activation_bytes(profile, workload),
        head_activation=end_activation_bytes(profile, workload, has_head=True),
    )


class _Seconds:
    """The cost model's answers, asked once per kind of layer and size of message."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.names = tuple(device.name for device in costs.cluster.devices)
        # In one process the chunks are only ever added up, so they count as one.
        self.is_summed = costs.execution == "one_process"
        self.chunk_tokens = tuple(tokens for tokens, _past in costs.workload.prefill_chunks)
        self.decode_of = cache(costs.decode_seconds)
        self.prefill_of = cache(self._prefill_of)

    def _prefill_of(self, unit: UnitProfile, name: str) -> tuple[float, ...]:
        chunks = self.costs.prefill_seconds(unit, name)
        return (math.fsum(chunks),) if self.is_summed else chunks

    def _layers(self) -> Iterable[UnitProfile]:
        # Layers that differ by their number alone are asked about once.
        return (layer.model_copy(update={"index": 0}) for layer in self.costs.profile.layers)

    def tick(self, workload: Workload) -> float:
        """Return the finest power of ten at which a whole request stays below 2**55 ticks."""
        steps = max(workload.new_tokens, 1)
        profile = self.costs.profile
        units = (profile.embedding, *self._layers(), profile.head)
        total = 0.0
        for unit in units:
            total += max(self.decode_of(unit, name) * steps + sum(self.prefill_of(unit, name)) for name in self.names)
            total += sum(self.costs.bus_seconds(unit, host) for host in self.costs.buses)
        hops = [self._hop(a, b, n) for a in self.names for b in self.names for n in {1, *self.chunk_tokens}]
        total += (
            max((h for h in hops if h < math.inf), default=0.0) * len(self.names) * (steps + len(self.chunk_tokens))
        )
        total *= workload.requests_in_flight
        tick = FINEST_TICK_SECONDS
        while total > tick * _MOST_TICKS:
            tick *= 10
        return tick

    def _hop(self, a: str, b: str, tokens: int) -> float:
        return self.costs.prefill_hop_seconds(a, b, tokens)

    def decode(self, name: str, tick: float) -> UnitTicks:
        profile = self.costs.profile
        return UnitTicks(
            _ticks(self.decode_of(profile.embedding, name), tick),
            tuple(_ticks(self.decode_of(layer, name), tick) for layer in self._layers()),
            _ticks(self.decode_of(profile.head, name), tick),
        )

    def buses(self, tick: float) -> tuple[Bus, ...]:
        profile, seconds = self.costs.profile, self.costs.bus_seconds
        return tuple(
            Bus(
                frozenset(self.names.index(name) for name in names),
                UnitTicks(
                    _ticks(seconds(profile.embedding, host), tick),
                    tuple(_ticks(seconds(layer, host), tick) for layer in self._layers()),
                    _ticks(seconds(profile.head, host), tick),
                ),
            )
            for host, names in self.costs.buses.items()
        )

    def prefill(self, name: str, tick: float) -> tuple[UnitTicks, ...]:
        profile = self.costs.profile
        embedding, head = self.prefill_of(profile.embedding, name), self.prefill_of(profile.head, name)
        layers = [self.prefill_of(layer, name) for layer in self._layers()]
        return tuple(
            UnitTicks(_ticks(embedding[c], tick), tuple(_ticks(x[c], tick) for x in layers), _ticks(head[c], tick))
            for c in range(len(head))
        )

    def prefill_hops(self, tick: float) -> tuple[Matrix, ...]:
        if self.is_summed:
            counts = {tokens: self.chunk_tokens.count(tokens) for tokens in self.chunk_tokens}
            return (self.matrix(lambda a, b: sum(n * self._hop(a, b, t) for t, n in counts.items()), tick),)
        by_size = {t: self.matrix(lambda a, b, t=t: self._hop(a, b, t), tick) for t in set(self.chunk_tokens)}
        return tuple(by_size[tokens] for tokens in self.chunk_tokens)

    def matrix(self, seconds: object, tick: float, *, is_to_itself: bool = False) -> Matrix:
        assert callable(seconds)
        return tuple(
            tuple(_ticks_or_none(seconds(a, b), tick) if a != b or is_to_itself else None for b in self.names)
            for a in self.names
        )


def _ticks(seconds: float, tick: float) -> Ticks:
    return round(seconds / tick)


def _ticks_or_none(seconds: float, tick: float) -> Ticks | None:
    return None if math.isinf(seconds) else round(seconds / tick)
