"""The report's map: hosts with their devices, what connects them, and the way of the hidden states through them.

Hosts stand in columns in the order in which the chain first visits them, devices in a host likewise; so the way goes
down a column and on to the next. The token ids come back over the top.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from planner.chart_memory import stage_words
from planner.drawing import Dot, Drawing, Path, Rect, Shape, Text, clipped
from planner.show import duration
from plans.cluster import Cluster, Host
from plans.plan import Plan

WIDTH = 960
COLUMN = 196
GAP = 72
HOST_TOP = 30
"""Height of a host's heading."""
DEVICE = 46
DEVICE_GAP = 38
TOP = 44
"""Room above the hosts for the way back."""
ROW_GAP = 60
MAX_UNUSED_PER_HOST = 3
SWITCH_WIDTH, SWITCH = 132, 26


@dataclass(frozen=True, slots=True)
class Box:
    """Where something stands."""

    x: float
    y: float
    width: float
    height: float
    column: int = 0

    @property
    def middle(self) -> float:
        """The x of its vertical centre line."""
        return self.x + self.width / 2

    @property
    def centre(self) -> float:
        """The y of its horizontal centre line."""
        return self.y + self.height / 2


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything's place."""

    hosts: dict[str, Box]
    devices: dict[str, Box]
    switches: dict[str, Box]
    hidden: dict[str, int]
    """Unused devices of a host that are not drawn."""
    height: float


def topology_drawing(plan: Plan) -> Drawing:
    """Return the map of a plan's cluster with the chosen way through it."""
    layout = lay_out(plan)
    shapes = [
        *_host_shapes(plan.cluster, layout),
        *_link_shapes(plan.cluster, layout),
        *_device_shapes(plan, layout),
        *_way_shapes(plan, layout),
        *_return_shapes(plan, layout),
    ]
    way = " to ".join(f"{stage.device} ({stage_words(stage)})" for stage in plan.stages)
    num_used = len(plan.stages)
    title = f"The way through {num_used} device{'s' if num_used > 1 else ''}"
    return Drawing("topology", title, way, WIDTH, layout.height, shapes)


def lay_out(plan: Plan) -> Layout:
    """Place hosts in columns, as many beside each other as fit, and hosts without devices (switches) below."""
    order = _hosts_in_order(plan)
    per_row = max(1, (WIDTH + GAP) // (COLUMN + GAP))
    num_columns = min(per_row, len(order))
    left = (WIDTH - num_columns * COLUMN - (num_columns - 1) * GAP) / 2
    hosts: dict[str, Box] = {}
    devices: dict[str, Box] = {}
    hidden: dict[str, int] = {}
    top = float(TOP if len(plan.stages) > 1 else 8)
    for start in range(0, len(order), per_row):
        row = order[start : start + per_row]
        shown = {name: _shown_devices(plan, name) for name in row}
        tallest = max(len(names) for names, _hidden in shown.values())
        height = HOST_TOP + tallest * DEVICE + (tallest - 1) * DEVICE_GAP + 24
        for column, name in enumerate(row):
            x = left + column * (COLUMN + GAP)
            hosts[name] = Box(x, top, COLUMN, height, column)
            names, hidden[name] = shown[name]
            for index, device in enumerate(names):
                y = top + HOST_TOP + index * (DEVICE + DEVICE_GAP)
                devices[device] = Box(x + 10, y, COLUMN - 20, DEVICE, column)
        top += height + ROW_GAP
    switches = _switch_boxes(plan.cluster, top - ROW_GAP + 34)
    bottom = max((box.y + box.height for box in (*hosts.values(), *switches.values())), default=top)
    return Layout(hosts, devices, switches, hidden, bottom + 12)


def _hosts_in_order(plan: Plan) -> list[str]:
    visited = [plan.cluster.device(stage.device).host for stage in plan.stages]
    return list(dict.fromkeys([*visited, *(device.host for device in plan.cluster.devices)]))


def _shown_devices(plan: Plan, host: str) -> tuple[list[str], int]:
    """The used devices of a host in chain order, a few unused ones, and the number of those left out."""
    here = [device.name for device in plan.cluster.devices if device.host == host]
    used = [stage.device for stage in plan.stages if stage.device in here]
    unused = [name for name in here if name not in used]
    return used + unused[:MAX_UNUSED_PER_HOST], len(unused[MAX_UNUSED_PER_HOST:])


def _switch_boxes(cluster: Cluster, top: float) -> dict[str, Box]:
    with_devices = {device.host for device in cluster.devices}
    names = [host.name for host in cluster.hosts if host.name not in with_devices]
    per_row = WIDTH // (SWITCH_WIDTH + 24)
    boxes = {}
    for index, name in enumerate(names):
        row, column = divmod(index, per_row)
        in_row = min(per_row, len(names) - row * per_row)
        left = (WIDTH - in_row * (SWITCH_WIDTH + 24) + 24) / 2
        boxes[name] = Box(left + column * (SWITCH_WIDTH + 24), top + row * (SWITCH + 14), SWITCH_WIDTH, SWITCH)
    return boxes


def _host_shapes(cluster: Cluster, layout: Layout) -> Iterator[Shape]:
    known = {host.name: host for host in cluster.hosts}
    for name, box in layout.hosts.items():
        address = known.get(name, Host(name=name)).address
        yield Rect(box.x, box.y, box.width, box.height, "host", f"host {name}", radius=8)
        title = name if address is None else f"{name} ({address})"
        yield Text(box.x + 12, box.y + 20, clipped(title, box.width - 20), "label quiet", title=title)
        if layout.hidden[name]:
            more = f"+ {layout.hidden[name]} more, not used"
            yield Text(box.x + 12, box.y + box.height - 8, more, "label quiet small")
    for name, box in layout.switches.items():
        yield Rect(box.x, box.y, box.width, box.height, "switch", f"{name}: a switch", radius=SWITCH / 2)
        yield Text(box.middle, box.y + 17, clipped(name, box.width - 16), "label quiet small", "middle", name)


def _device_shapes(plan: Plan, layout: Layout) -> Iterator[Shape]:
    stages = {stage.device: (index, stage) for index, stage in enumerate(plan.stages)}
    for name, box in layout.devices.items():
        if name not in stages:
            yield Rect(box.x, box.y, box.width, box.height, "device unused", f"{name}: not used", radius=6)
            yield Text(box.x + 12, box.y + 20, clipped(name, box.width - 24), "label quiet", title=name)
            yield Text(box.x + 12, box.y + 36, "not used", "label quiet small")
            continue
        index, stage = stages[name]
        words = stage_words(stage)
        title = f"{name}: {words}; {duration(stage.decode_seconds)} per token"
        yield Rect(box.x, box.y, box.width, box.height, "device", title, radius=6)
        yield Dot(box.x + 18, box.centre, 11, "badge")
        yield Text(box.x + 18, box.centre + 4, str(index + 1), "badge-text", "middle")
        yield Text(box.x + 36, box.y + 20, clipped(name, box.width - 42), "label strong", title=name)
        yield Text(box.x + 36, box.y + 36, clipped(words, box.width - 36), "label quiet small", title=words)


def _link_shapes(cluster: Cluster, layout: Layout) -> Iterator[Shape]:
    """Stated links by name, thin and behind everything else that matters."""
    places = {**layout.hosts, **layout.switches, **layout.devices}
    for link in cluster.links:
        a, b = places.get(link.from_ or ""), places.get(link.to or "")
        if a is None or b is None:
            continue
        title = (
            f"{link.from_} to {link.to}: {link.bandwidth_bytes_per_second / 1e9:.4g} GB/s, "
            f"{duration(link.latency_seconds)}"
        )
        (ax, ay), (bx, by) = _link_end(a, b, layout), _link_end(b, a, layout)
        bend = max(24.0, abs(by - ay) / 2)
        curve = f"M{ax:.1f} {ay:.1f}C{ax:.1f} {ay + bend:.1f} {bx:.1f} {by + bend:.1f} {bx:.1f} {by:.1f}"
        yield Path(curve, "link", title)


def _link_end(box: Box, other: Box, layout: Layout) -> tuple[float, float]:
    """Links hang below hosts and leave switches on the side that is nearer."""
    is_switch = box in layout.switches.values()
    if is_switch and other.y < box.y:
        return box.middle, box.y
    return box.middle, box.y + box.height


def _way_shapes(plan: Plan, layout: Layout) -> Iterator[Shape]:
    for a, b in pairwise(plan.stages):
        start, end = layout.devices[a.device], layout.devices[b.device]
        hop = duration(a.hop_seconds)
        title = f"{a.device} to {b.device}: {hop} per decode step"
        if start.column == end.column and start.x == end.x and 0 < end.y - start.y <= DEVICE + DEVICE_GAP:
            x, y = start.middle, start.y + start.height
            yield Path(f"M{x:.1f} {y:.1f}V{end.y - 3:.1f}", "way", title, has_arrow=True)
            yield Text(x + 10, (y + end.y) / 2 + 3, hop, "label way-text small", title=title)
            continue
        yield from _curve(start, end, hop, title)


def _curve(start: Box, end: Box, hop: str, title: str) -> Iterator[Shape]:
    """A bend from side to side; over the right where both stand in one column."""
    side = 1 if end.x >= start.x else -1
    x0 = start.x + start.width if side > 0 else start.x
    y0, y1 = start.centre, end.centre
    if start.x == end.x:
        x1, out0, out1 = end.x + end.width + 3, x0 + 46, end.x + end.width + 46
        label_x, label_y = x0 + 38, (y0 + y1) / 2
    else:
        x1 = end.x - 3 if side > 0 else end.x + end.width + 3
        reach = max(30.0, abs(x1 - x0) * 0.5)
        out0, out1 = x0 + side * reach, x1 - side * reach
        label_x, label_y = (x0 + x1) / 2, (y0 + y1) / 2 - 8
    yield Path(
        f"M{x0:.1f} {y0:.1f}C{out0:.1f} {y0:.1f} {out1:.1f} {y1:.1f} {x1:.1f} {y1:.1f}", "way", title, has_arrow=True
    )
    yield Text(label_x, label_y, hop, "label way-text small", "middle", title)


def _return_shapes(plan: Plan, layout: Layout) -> Iterator[Shape]:
    if len(plan.stages) < 2:
        return
    last, first = layout.devices[plan.stages[-1].device], layout.devices[plan.stages[0].device]
    seconds = duration(plan.prediction.return_hop_seconds)
    title = f"token ids back from {plan.stages[-1].device} to {plan.stages[0].device}: {seconds}"
    x0, turn, up = last.x + last.width, last.x + last.width + 30, 18.0
    x1, r = first.middle, 10.0
    path = (
        f"M{x0:.1f} {last.centre:.1f}H{turn - r:.1f}Q{turn:.1f} {last.centre:.1f} {turn:.1f} {last.centre - r:.1f}"
        f"V{up + r:.1f}Q{turn:.1f} {up:.1f} {turn - r:.1f} {up:.1f}H{x1 + r:.1f}"
        f"Q{x1:.1f} {up:.1f} {x1:.1f} {up + r:.1f}V{first.y - 3:.1f}"
    )
    yield Path(path, "way back", title, has_arrow=True)
    yield Text((x1 + turn) / 2, up - 6, f"token ids back, {seconds}", "label quiet small", "middle", title)
