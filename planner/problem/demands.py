"""What a user fixes by hand: ``--layers``, ``--pin`` and ``--ban`` -> rules for single devices, or a whole chain.

--layers 18,10,4                 so many layers on the first, second, third device; * leaves a number open
--layers 0-16@cuda:0,16-32@cpu   these layers, and no others, on these devices
--pin 0-4@cuda:0                 these layers there, perhaps with others; also embedding@cpu, head@cuda:1
--ban cuda:1                     not this device; 0-4@cuda:1, embedding@cpu: not these units there
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from planner.problem.problem import Assignment, Rule, StageChoice
from plans.cuts import layer_ranges, read_counts
from plans.errors import UsageError, printable
from plans.plan import Demands

_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Terms:
    """What demands mean for a problem: rules by device name, or a chain."""

    rules: Mapping[str, Rule] = field(default_factory=dict)
    given: Assignment | None = None
    """A complete chain, which leaves nothing to choose."""
    keep_order: bool = False


def read_demands(demands: Demands, *, names: Sequence[str], num_layers: int) -> Terms:
    """Read demands as they were written.

    Args:
        names: the devices in the order given.
        num_layers: of the model.

    Raises:
        UsageError: malformed, unknown device, or demands that contradict each other.
    """
    reader = _Reader(tuple(names), num_layers, demands.keep_order)
    for pin in demands.pins:
        reader.pin(pin)
    for ban in demands.bans:
        reader.ban(ban)
    if demands.layers is None:
        return Terms(reader.rules, keep_order=reader.keep_order)
    return reader.ranges(demands.layers) if "@" in demands.layers else reader.counts(demands.layers)


@dataclass(slots=True)
class _Reader:
    names: tuple[str, ...]
    num_layers: int
    keep_order: bool
    rules: dict[str, Rule] = field(default_factory=dict)
    pinned: dict[int, str] = field(default_factory=dict)

    def counts(self, text: str) -> Terms:
        counts = read_counts(text)
        if counts is None:
            raise self._malformed("--layers", text, "18,10,4 or 18,*,4 or 0-16@cuda:0,16-32@cpu")
        if len(counts) > len(self.names):
            raise UsageError(f"--layers names {len(counts)} stages, there are {len(self.names)} devices")
        known = [count for count in counts if count is not None]
        is_complete = len(known) == len(counts)
        if sum(known) > self.num_layers or (is_complete and sum(known) != self.num_layers):
            raise UsageError(f"--layers {printable(text)} adds up to {sum(known)}, the model has {self.num_layers}")
        if 0 in counts[1:-1]:
            raise UsageError(f"--layers {printable(text)} leaves a stage between the ends empty")
        if is_complete and not self.rules:
            stages = tuple(StageChoice(i, start, end) for i, (start, end) in enumerate(layer_ranges(known)))
            return Terms({}, stages, self.keep_order)
        for name, count in zip(self.names, counts, strict=False):
            self._demand(name, replace(self._rule(name), is_required=True, min_layers=count or 0, max_layers=count))
        for name in self.names[len(counts) :]:
            self._demand(name, replace(self._rule(name), is_banned=True))
        return Terms(self.rules, keep_order=True)

    def ranges(self, text: str) -> Terms:
        stages = [self._stage(part, text) for part in text.split(",")]
        used = [stage.device for stage in stages]
        if len(set(used)) != len(used):
            raise UsageError(f"--layers {printable(text)} names a device twice")
        ends = [(stage.start, stage.end) for stage in stages]
        if any(a[1] > b[0] for a, b in pairwise(ends)):
            raise UsageError(f"--layers {printable(text)} overlaps or is out of order")
        is_whole = all(a[1] == b[0] for a, b in pairwise(ends))
        if is_whole and ends[0][0] == 0 and ends[-1][1] == self.num_layers and not self.rules:
            return Terms({}, tuple(stages), self.keep_order)
        for stage in stages:
            self._fix(stage)
        return Terms(self.rules, keep_order=self.keep_order)

    def _stage(self, part: str, text: str) -> StageChoice:
        span, separator, name = part.partition("@")
        match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", span, re.ASCII)
        if not separator or match is None:
            raise self._malformed("--layers", text, "for example 0-16@cuda:0,16-32@cpu")
        start, end = int(match.group(1)), int(match.group(2))
        if not start <= end <= self.num_layers or (start == end and 0 < start < self.num_layers):
            raise UsageError(
                f"--layers: {printable(part)} is no range of layers", expected=f"start-end within 0-{self.num_layers}"
            )
        self._known("--layers", name)
        return StageChoice(self.names.index(name), start, end)

    def _fix(self, stage: StageChoice) -> None:
        name, size = self.names[stage.device], stage.end - stage.start
        rule = replace(
            self._rule(name),
            is_required=True,
            max_start=stage.start,
            min_end=stage.end,
            min_layers=size,
            max_layers=size,
        )
        if not size:
            rule = replace(rule, embedding=stage.end == 0, head=stage.start == self.num_layers)
        self._demand(name, rule)

    def pin(self, text: str) -> None:
        what, separator, name = text.partition("@")
        if not separator:
            raise self._malformed("--pin", text, "for example 0-4@cuda:0, embedding@cpu or head@cuda:1")
        self._known("--pin", name)
        rule = replace(self._rule(name), is_required=True)
        if what in ("embedding", "head"):
            self._demand(name, replace(rule, embedding=True) if what == "embedding" else replace(rule, head=True))
            return
        start, end = self._span("--pin", what, text)
        for layer in range(start, end):
            if self.pinned.setdefault(layer, name) != name:
                raise UsageError(f"--pin puts layer {layer} on {self.pinned[layer]} and on {name}")
        first = start if rule.max_start is None else min(start, rule.max_start)
        last = end if rule.min_end is None else max(end, rule.min_end)
        self._demand(name, replace(rule, max_start=first, min_end=last))

    def ban(self, text: str) -> None:
        what, separator, name = text.partition("@")
        self._known("--ban", name if separator else text)
        if not separator:
            self._demand(text, replace(self._rule(text), is_banned=True))
        elif what in ("embedding", "head"):
            rule = self._rule(name)
            self._demand(name, replace(rule, embedding=False) if what == "embedding" else replace(rule, head=False))
        else:
            start, end = self._span("--ban", what, text)
            rule = self._rule(name)
            self._demand(name, replace(rule, banned=rule.banned | frozenset(range(start, end))))

    def _rule(self, name: str) -> Rule:
        return self.rules.get(name, Rule())

    def _demand(self, name: str, rule: Rule) -> None:
        if rule.is_required and rule.is_banned:
            raise UsageError(f"{name} is both demanded and banned")
        self.rules[name] = rule

    def _span(self, option: str, what: str, text: str) -> tuple[int, int]:
        match = _RANGE.fullmatch(what)
        if match is None:
            raise self._malformed(option, text, "LAYERS@DEVICE, for example 0-4@cuda:0 or 7@cpu")
        start = int(match.group(1))
        end = start + 1 if match.group(2) is None else int(match.group(2))
        if not start < end <= self.num_layers:
            raise UsageError(
                f"{option} {printable(text)} is no range of layers", expected=f"within 0-{self.num_layers}"
            )
        return start, end

    def _known(self, option: str, name: str) -> None:
        if name not in self.names:
            raise UsageError(
                f"{option} names '{printable(name, limit=64)}', which is no device here",
                expected="one of " + ", ".join(self.names),
            )

    def _malformed(self, option: str, text: str, example: str) -> UsageError:
        return UsageError(f"{option} '{printable(text)}' is not understood", expected=example)
