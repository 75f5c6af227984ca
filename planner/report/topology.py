"""The report's map: hosts with their devices, what connects them, and the way of the hidden states through them.

Hosts stand in columns in the order in which the chain first visits them, devices in a host likewise; so the way goes
down a column and on to the next. The token ids come back over the top.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from planner.report.drawing import Dot, Drawing, Path, Rect, Shape, Text, clipped
from planner.show.words import duration
from plans.cluster import Cluster, Host
from plans.plan import Plan

WIDTH = 960
COLUMN, WIDEST_COLUMN = 186, 250
GAP = 72
MARGIN, HOST_MARGIN = 12, 10
HOST_TOP = 30
"""Height of a host's heading."""
DEVICE = 46
DEVICE_GAP = 38
TOP = 44
"""Room above the hosts for the way back."""
ROW_GAP = 60
MAX_UNUSED_PER_HOST = 3
MOST_IN_A_COLUMN, DEVICES_IN_A_ROW = 5, 3
SWITCH_WIDTH, SWITCH = 132, 26
LINK_BEND = 24
ROOM_FOR_A_BEND = 80


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

    hosts: dict[str, Box] = field(default_factory=dict)
    devices: dict[str, Box] = field(default_factory=dict)
    switches: dict[str, Box] = field(default_factory=dict)
    hidden: dict[str, int] = field(default_factory=dict)
    """Unused devices of a host that are not drawn."""

    @property
    def height(self) -> float:
        """Height of the drawing."""
        bottom = max(box.y + box.height for box in (*self.hosts.values(), *self.switches.values()))
        return bottom + MARGIN * (2 if self.switches else 1)


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
    way = " to ".join(f"{stage.device} ({stage.words})" for stage in plan.ranges)
    num_used = len(plan.stages)
    title = f"The way through {num_used} device{'s' if num_used > 1 else ''}"
    return Drawing("topology", title, way, WIDTH, layout.height, shapes)


def lay_out(plan: Plan) -> Layout:
    """Place hosts in columns, as many beside each other as fit, and hosts without devices (switches) below.

    The devices of a cluster's only host stand in rows, if there are many, and are visited there and back.
    """
    order = _hosts_in_order(plan)
    layout = Layout()
    top = float(TOP if len(plan.stages) > 1 else 8)
    num_devices = len(_shown_devices(plan, order[0])[0])
    if len(order) == 1 and num_devices > MOST_IN_A_COLUMN:
        _place_host(layout, plan, order[0], _Slot(HOST_MARGIN, top, num_columns=DEVICES_IN_A_ROW))
        return layout
    per_row = (WIDTH + GAP) // (COLUMN + GAP)
    num_columns = min(per_row, len(order))
    width = min(WIDEST_COLUMN, (WIDTH - (num_columns - 1) * GAP) / num_columns)
    left = (WIDTH - num_columns * width - (num_columns - 1) * GAP) / 2
    for number, start in enumerate(range(0, len(order), per_row)):
        for place, name in enumerate(order[start : start + per_row]):
            column = num_columns - 1 - place if number % 2 else place  # there and back
            _place_host(layout, plan, name, _Slot(left + column * (width + GAP), top, width=width, column=column))
        top = layout.height - MARGIN + ROW_GAP
    layout.switches.update(_switch_boxes(plan.cluster, top - ROW_GAP + 34))
    return layout


@dataclass(frozen=True, slots=True)
class _Slot:
    """The room given to a host."""

    x: float
    y: float
    width: float = 0.0
    column: int = 0
    num_columns: int = 1


def _place_host(layout: Layout, plan: Plan, name: str, slot: _Slot) -> None:
    names, layout.hidden[name] = _shown_devices(plan, name)
    num_rows = -(-len(names) // slot.num_columns)
    full_width = slot.width if slot.num_columns == 1 else WIDTH - 2 * HOST_MARGIN
    inner = (full_width - 2 * HOST_MARGIN - (slot.num_columns - 1) * GAP) / slot.num_columns
    height = HOST_TOP + num_rows * DEVICE + (num_rows - 1) * DEVICE_GAP + 24
    layout.hosts[name] = Box(slot.x, slot.y, full_width, height, slot.column)
    for index, device in enumerate(names):
        row, place = divmod(index, slot.num_columns)
        column = slot.num_columns - 1 - place if row % 2 else place  # there and back
        x = slot.x + HOST_MARGIN + column * (inner + GAP)
        y = slot.y + HOST_TOP + row * (DEVICE + DEVICE_GAP)
        layout.devices[device] = Box(x, y, inner, DEVICE, slot.column + column)


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
        words = stage.range.words
        title = f"{name}: {words}; {duration(stage.decode_seconds)} per token"
        yield Rect(box.x, box.y, box.width, box.height, "device", title, radius=6)
        yield Dot(box.x + 18, box.centre, 11, "badge")
        yield Text(box.x + 18, box.centre + 4, str(index), "badge-text", "middle")
        yield Text(box.x + 36, box.y + 20, clipped(name, box.width - 42, size=13), "label strong", title=name)
        yield Text(box.x + 36, box.y + 36, clipped(words, box.width - 40, size=11), "label quiet small", title=words)


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
        (ay, a_bend), (by, b_bend) = _link_end(a, b), _link_end(b, a)
        curve = f"M{a.middle:.1f} {ay:.1f}C{a.middle:.1f} {ay + a_bend:.1f} {b.middle:.1f} {by + b_bend:.1f}"
        yield Path(f"{curve} {b.middle:.1f} {by:.1f}", "link", title)


def _link_end(box: Box, other: Box) -> tuple[float, float]:
    """Return where a link leaves a box, and how far it goes straight on: up to what stands higher, else down."""
    is_below = box.y >= other.y + other.height
    return (box.y, -LINK_BEND) if is_below else (box.y + box.height, LINK_BEND)


def _way_shapes(plan: Plan, layout: Layout) -> Iterator[Shape]:
    for a, b in pairwise(plan.stages):
        start, end = layout.devices[a.device], layout.devices[b.device]
        hop = duration(a.hop_seconds)
        title = f"{a.device} to {b.device}: {hop} per decode step"
        if _is_next_below(start, end, layout):
            x, y = start.middle, start.y + start.height
            yield Path(f"M{x:.1f} {y:.1f}V{end.y - 3:.1f}", "way", title, has_arrow=True)
            yield Text(x + 10, (y + end.y) / 2 + 3, hop, "label way-text small", title=title)
            continue
        yield from _curve(start, end, hop, title)


def _is_next_below(start: Box, end: Box, layout: Layout) -> bool:
    is_alone = not any(start.y < box.y < end.y for box in layout.devices.values() if box.column == start.column)
    return start.column == end.column and start.y < end.y and is_alone


def _curve(start: Box, end: Box, hop: str, title: str) -> Iterator[Shape]:
    """A bend from side to side; beside both where they stand in one column."""
    is_one_column = start.column == end.column
    has_room = start.x + start.width + ROOM_FOR_A_BEND < WIDTH
    side = (1 if has_room else -1) if is_one_column else (1 if end.x >= start.x else -1)
    x0 = start.x + start.width if side > 0 else start.x
    y0, y1 = start.centre, end.centre
    if is_one_column:
        x1, out0, out1 = x0 + side * 3, x0 + side * 46, x0 + side * 46
        label_x, label_y = x0 + side * 38, (y0 + y1) / 2
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
    x0, y0, up = last.x + last.width, last.centre + 13, 18.0
    turn = min(x0 + 15, WIDTH - 4)
    x1, r = first.x + first.width - 26, 8.0
    path = (
        f"M{x0:.1f} {y0:.1f}H{turn - r:.1f}Q{turn:.1f} {y0:.1f} {turn:.1f} {y0 - r:.1f}"
        f"V{up + r:.1f}Q{turn:.1f} {up:.1f} {turn - r:.1f} {up:.1f}H{x1 + r:.1f}"
        f"Q{x1:.1f} {up:.1f} {x1:.1f} {up + r:.1f}V{first.y - 3:.1f}"
    )
    yield Path(path, "way back", title, has_arrow=True)
    yield Text((x1 + turn) / 2, up - 6, f"token ids back, {seconds}", "label quiet small", "middle", title)
