"""The partition problem as plain data: integers only, no model, no solver.

Bytes are exact. Times are whole ticks of `tick_seconds` (a picosecond unless a plan would last for hours), so that
sums do not depend on their order, ties are ties, and two methods can be compared for equality.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from plans.plan import Execution, Objective
from plans.stages import StageRange

Ticks = int
Matrix = tuple[tuple[int | None, ...], ...]
"""[from][to]; None where there is no way from one to the other."""


@dataclass(frozen=True, slots=True)
class UnitTicks:
    """What each unit of the model costs on one device, in ticks."""

    embedding: Ticks
    layers: tuple[Ticks, ...]
    head: Ticks


@dataclass(frozen=True, slots=True)
class Rule:
    """What the user demands of one device; the default demands nothing.

    A stage [start, end) on the device must have start and end within the given bounds, hold none of `banned`, and
    hold (True), not hold (False) or may hold (None) the embedding and the head.
    """

    is_required: bool = False
    is_banned: bool = False
    max_start: int | None = None
    min_end: int | None = None
    min_layers: int = 0
    max_layers: int | None = None
    banned: frozenset[int] = frozenset()
    embedding: bool | None = None
    head: bool | None = None

    @property
    def is_positional(self) -> bool:
        """Whether it speaks of particular layers rather than of their number."""
        return self.max_start is not None or self.min_end is not None or bool(self.banned)


@dataclass(frozen=True, slots=True)
class ProblemDevice:
    """One device: its memory in bytes and its times in ticks."""

    name: str
    budget_bytes: int
    """What shares are measured against."""
    overhead_bytes: int
    """Paid by any stage."""
    limit_bytes: int
    """What a stage may use, overhead included: the budget, or less under a limit on the memory share."""
    decode: UnitTicks
    prefill: tuple[UnitTicks, ...] = ()
    """One entry per prefill chunk."""
    rule: Rule = Rule()


@dataclass(frozen=True, slots=True)
class Bus:
    """Devices that read through one memory bus, and how long it is busy with each unit in a decode step."""

    devices: frozenset[int]
    units: UnitTicks


@dataclass(frozen=True, slots=True)
class UnitBytes:
    """Memory of the units, the same on every device."""

    embedding: int
    layers: tuple[int, ...]
    """Weights and KV cache of each layer."""
    head: int
    shared: int = 0
    """Saved when embedding and head are on one device (a tied table)."""
    embedding_activation: int = 0
    layer_activation: int = 0
    head_activation: int = 0


@dataclass(frozen=True, slots=True)
class StageChoice:
    """Layers [start, end) on device number `device`; the first stage has the embedding, the last the head."""

    device: int
    start: int
    end: int


Assignment = tuple[StageChoice, ...]


@dataclass(frozen=True)
class Problem:
    """Everything the exact methods need to know."""

    devices: tuple[ProblemDevice, ...]
    units: UnitBytes
    decode_hop: Matrix
    return_hop: Matrix
    """[last][first]: the way of the token ids back."""
    prefill_hop: tuple[Matrix, ...] = ()
    """One matrix per prefill chunk."""
    new_tokens: int = 1
    requests_in_flight: int = 1
    execution: Execution = "one_process"
    keep_order: bool = False
    use_all: bool = False
    max_stages: int | None = None
    tick_seconds: float = 1e-12
    buses: tuple[Bus, ...] = ()
    """No device is on two of them. With requests in flight all stages read at once, and a step takes at least as long
    as a bus is busy with all that is read through it."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.units.layers)

    @property
    def num_devices(self) -> int:
        """Number of devices offered."""
        return len(self.devices)

    @cached_property
    def has_identical_layers(self) -> bool:
        """Whether only the number of layers on a device matters, not which ones."""
        rows: Iterable[tuple[int, ...]] = (
            self.units.layers,
            *(times.layers for device in self.devices for times in (device.decode, *device.prefill)),
            *(bus.units.layers for bus in self.buses),
        )
        return all(len(set(row)) == 1 for row in rows) and not any(d.rule.is_positional for d in self.devices)

    @cached_property
    def prefix_bytes(self) -> tuple[int, ...]:
        """Bytes of layers [0, i) for i from 0 to the number of layers."""
        return prefix_sums(self.units.layers)

    def ranges(self, assignment: Assignment) -> tuple[StageRange, ...]:
        """Return which units an assignment gives to which device."""
        last = len(assignment) - 1
        return tuple(
            StageRange(self.devices[s.device].name, s.start, s.end, i == 0, i == last) for i, s in enumerate(assignment)
        )

    def seconds(self, ticks: Fraction | Ticks, objective: Objective) -> float:
        """Return a time objective in seconds; the ticks of `throughput` are step periods times requests in flight."""
        in_flight = self.requests_in_flight if objective == "throughput" else 1
        return float(Fraction(ticks) / in_flight) * self.tick_seconds

    def stage_bytes(self, device: int, start: int, end: int, *, embedding: bool, head: bool) -> int:
        """Return the bytes a stage needs on `device`, as `plans.memory.stage_memory` counts them."""
        units = self.units
        size = self.devices[device].overhead_bytes + self.prefix_bytes[end] - self.prefix_bytes[start]
        size += units.embedding * embedding + units.head * head - units.shared * (embedding and head)
        return size + self.activation_bytes(has_layers=end > start, embedding=embedding, head=head)

    def activation_bytes(self, *, has_layers: bool, embedding: bool, head: bool) -> int:
        """Return the workspace: the largest over the kinds of unit a stage holds."""
        units = self.units
        return max(
            units.layer_activation * has_layers, units.embedding_activation * embedding, units.head_activation * head
        )

    def allows(self, device: int, start: int, end: int, *, embedding: bool, head: bool) -> bool:
        """Return whether a stage fits the device's memory and obeys its rule."""
        rule = self.devices[device].rule
        if rule.is_banned or rule.embedding is (not embedding) or rule.head is (not head):
            return False
        if not rule.min_layers <= end - start <= (self.num_layers if rule.max_layers is None else rule.max_layers):
            return False
        if (rule.max_start is not None and start > rule.max_start) or (rule.min_end is not None and end < rule.min_end):
            return False
        if any(start <= layer < end for layer in rule.banned):
            return False
        needed = self.stage_bytes(device, start, end, embedding=embedding, head=head)
        return needed <= self.devices[device].limit_bytes

    def with_hops(self, change: Callable[[Matrix], Matrix]) -> "Problem":
        """Return the problem with all its matrices of hop times changed."""
        return replace(
            self,
            decode_hop=change(self.decode_hop),
            return_hop=change(self.return_hop),
            prefill_hop=tuple(map(change, self.prefill_hop)),
        )

    def with_share_limit(self, share: Fraction, *, is_strict: bool = False) -> "Problem":
        """Return the problem in which no stage may use more than `share` of its budget (less than, if strict)."""
        return replace(self, devices=tuple(_limited(d, share, is_strict=is_strict) for d in self.devices))


def _limited(device: ProblemDevice, share: Fraction, *, is_strict: bool) -> ProblemDevice:
    # Integers: used <= share * budget is used <= floor(share * budget); strictly less is at most ceil(...) - 1.
    product = share * device.budget_bytes
    limit = -(-product.numerator // product.denominator) - 1 if is_strict else product.numerator // product.denominator
    return replace(device, limit_bytes=min(device.limit_bytes, limit))


def prefix_sums(values: Iterable[int]) -> tuple[int, ...]:
    """Return (0, v0, v0 + v1, ...)."""
    sums = [0]
    for value in values:
        sums.append(sums[-1] + value)
    return tuple(sums)


def max_layers(problem: Problem, device: int, *, embedding: bool, head: bool) -> int:
    """Return the largest number of identical layers a stage can hold, or -1 if not even the ends fit."""
    units, data = problem.units, problem.devices[device]
    rule = data.rule
    if rule.is_banned or rule.embedding is (not embedding) or rule.head is (not head):
        return -1
    if problem.stage_bytes(device, 0, 0, embedding=embedding, head=head) > data.limit_bytes:
        return -1
    room = data.limit_bytes - problem.stage_bytes(device, 0, 1, embedding=embedding, head=head)
    per_layer = units.layers[0]
    fits = 0 if room < 0 else 1 + (room // per_layer if per_layer else problem.num_layers)
    fits = min(fits, problem.num_layers, problem.num_layers if rule.max_layers is None else rule.max_layers)
    return fits if fits >= rule.min_layers else -1


@dataclass(frozen=True, slots=True)
class ChainCosts:
    """An additive time: every unit, hop and the way back contribute their own ticks."""

    units: tuple[UnitTicks, ...]
    """One entry per device."""
    hop: Matrix
    back: Matrix
    """[last][first]."""


def chain_costs(problem: Problem, objective: Objective) -> ChainCosts:
    """Return the additive costs of an objective.

    `latency` and the cycle of `throughput`: one decode step. `request`: all prefill chunks one after the other, then
    a decode step for every new token but the first, which the prefill already gives. Of a
    pipelined prefill only a lower bound adds up: every stage works at least once on its shortest chunk.
    """
    if objective != "request":
        return ChainCosts(tuple(d.decode for d in problem.devices), problem.decode_hop, problem.return_hop)
    steps = max(problem.new_tokens - 1, 0)
    gather = min if is_pipelined(problem, objective) else sum
    units = tuple(_weighted_units(d.prefill, d.decode, steps, gather) for d in problem.devices)
    hop = _weighted_matrix(problem.prefill_hop, problem.decode_hop, steps, gather)
    return ChainCosts(units, hop, _weighted_matrix((), problem.return_hop, steps, gather))


def bus_costs(problem: Problem) -> tuple[tuple[UnitTicks, ...], ...]:
    """Return, for every bus, how long each unit on each device keeps it busy: nothing where the device is not on it."""
    nothing = UnitTicks(0, (0,) * problem.num_layers, 0)
    devices = range(problem.num_devices)
    return tuple(tuple(bus.units if d in bus.devices else nothing for d in devices) for bus in problem.buses)


def is_pipelined(problem: Problem, objective: Objective) -> bool:
    """Return whether the objective's time does not add up along the chain: chunks overlap on several stages."""
    return objective == "request" and problem.execution == "process_per_stage" and len(problem.prefill_hop) > 1


def queue_costs(problem: Problem) -> tuple[UnitTicks, ...]:
    """Return, per device, what a stage adds to the lower bound of a pipelined prefill if it is the slowest.

    All chunks pass through it one after the other; `chain_costs` already counts its shortest one.
    """
    return tuple(
        UnitTicks(
            sum(c.embedding for c in d.prefill) - min(c.embedding for c in d.prefill),
            tuple(sum(parts) - min(parts) for parts in zip(*(c.layers for c in d.prefill), strict=True)),
            sum(c.head for c in d.prefill) - min(c.head for c in d.prefill),
        )
        for d in problem.devices
    )


_Gather = Callable[[Iterable[int]], int]


def _weighted_units(chunks: tuple[UnitTicks, ...], decode: UnitTicks, steps: int, gather: _Gather) -> UnitTicks:
    if not chunks:
        return UnitTicks(steps * decode.embedding, tuple(steps * t for t in decode.layers), steps * decode.head)
    layers = zip(*(c.layers for c in chunks), strict=True)
    return UnitTicks(
        gather(c.embedding for c in chunks) + steps * decode.embedding,
        tuple(gather(parts) + steps * last for parts, last in zip(layers, decode.layers, strict=True)),
        gather(c.head for c in chunks) + steps * decode.head,
    )


def _weighted_matrix(chunks: tuple[Matrix, ...], decode: Matrix, steps: int, gather: _Gather) -> Matrix:
    def cell(a: int, b: int) -> int | None:
        parts = [chunk[a][b] for chunk in chunks]
        known = [part for part in parts if part is not None]
        last = decode[a][b]
        if last is None or len(known) < len(parts):
            return None
        return (gather(known) if known else 0) + steps * last

    size = range(len(decode))
    return tuple(tuple(cell(a, b) for b in size) for a in size)
