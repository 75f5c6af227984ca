"""The report's memory bars: one stacked bar per device, as long as its budget."""

from planner.report.drawing import Drawing, Rect, Shape, Text, clipped
from planner.show.plan import unused_devices
from plans.plan import Plan, Stage
from plans.reading.sizes import format_bytes

PARTS = (
    ("weights", "weight_bytes", "weights"),
    ("KV cache", "kv_cache_bytes", "kv"),
    ("activations", "activation_bytes", "activations"),
    ("overhead", "overhead_bytes", "overhead"),
)
"""(label, key of a stage, class)."""
WIDTH = 960
ROW = 50
BAR = 20
LEFT, RIGHT = 210, 200
MAX_UNUSED = 12


def memory_drawing(plan: Plan) -> Drawing:
    """Return one row per stage, and one for each device that holds nothing."""
    unused = unused_devices(plan)[:MAX_UNUSED]
    shapes: list[Shape] = []
    for row, stage in enumerate(plan.stages):
        shapes += _stage_row(stage, row * ROW)
    for row, name in enumerate(unused, start=len(plan.stages)):
        shapes += _unused_row(plan, name, row * ROW)
    fullest = max(plan.stages, key=lambda stage: stage.total_bytes / stage.budget_bytes)
    described = "; ".join(f"{s.device}: {_used_text(s)}" for s in plan.stages)
    return Drawing(
        "memory",
        f"Memory per device; the fullest is {fullest.device}",
        described,
        WIDTH,
        ROW * (len(plan.stages) + len(unused)),
        shapes,
    )


def _used_text(stage: Stage) -> str:
    return f"{format_bytes(stage.total_bytes)} of {format_bytes(stage.budget_bytes)}"


def _stage_row(stage: Stage, top: float) -> list[Shape]:
    length, words = WIDTH - LEFT - RIGHT, stage.range.words
    shapes: list[Shape] = [
        Text(0, top + 20, clipped(stage.device, LEFT - 20), "label strong", title=stage.device),
        Text(0, top + 37, clipped(words, LEFT - 20), "label quiet", title=words),
        Rect(LEFT, top + 12, length, BAR, "free", f"{stage.device}: budget {stage.budget_bytes} bytes", radius=3),
    ]
    position = float(LEFT)
    for label, key, css in PARTS:
        size = getattr(stage, key)
        width = size / stage.budget_bytes * length
        title = f"{stage.device}: {label} {format_bytes(size)} ({size} bytes)"
        if size:
            shapes.append(Rect(position, top + 12, width, BAR, css, title))
        position += width
    share = stage.total_bytes / stage.budget_bytes
    shapes += [
        Text(WIDTH, top + 20, f"{share:.1%}", "label strong", anchor="end"),
        Text(WIDTH, top + 37, _used_text(stage), "label quiet", anchor="end"),
    ]
    return shapes


def _unused_row(plan: Plan, name: str, top: float) -> list[Shape]:
    budget = plan.cluster.device(name).budget_bytes or 0
    return [
        Text(0, top + 20, clipped(name, LEFT - 20), "label quiet", title=name),
        Text(0, top + 37, "not used", "label quiet"),
        Rect(LEFT, top + 12, WIDTH - LEFT - RIGHT, BAR, "free unused", f"{name}: not used", radius=3),
        Text(WIDTH, top + 37, f"{format_bytes(budget)} free", "label quiet", anchor="end"),
    ]
