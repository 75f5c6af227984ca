"""The report: self-contained, the same every time, safe with hostile names, readable, and honest about its numbers."""

import json
import re
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

from planner.devices.clusters import load_cluster
from planner.program.effort import Effort
from planner.report.drawing import Drawing, Rect, Text, clipped, log_ticks, nice_ticks, number
from planner.report.memory import memory_drawing
from planner.report.origins import decode_origin, hop_origin, sources_of
from planner.report.page import render_report
from planner.report.timeline import decode_drawing, prefill_drawing
from planner.report.topology import lay_out, topology_drawing
from planner.report.tradeoff import Point, tradeoff_drawing
from planner.rivals.alternatives import Alternatives, alternatives_to
from planner.simulate.one_plan import simulate_plan
from planner.timing.costs import CostModel
from plans.cluster import Cluster, Timings
from plans.errors import ExitCode
from plans.plan import Plan
from tests.conftest import RunCommand
from tests.planner.cases import class_link, cluster, device, link, make_plan, solve, tiny_profile, workload
from tests.planner.report.browser import CHROMIUM, open_page

EXAMPLES = Path(__file__).parents[3] / "plans" / "examples"
CSS = Path(__file__).parents[3] / "planner" / "report" / "templates" / "report.css.j2"
REFERENCES = {"src", "href", "xlink:href", "action", "data", "srcset", "poster"}
VOID = {"meta", "br", "link", "img", "hr", "input"}
LEAST_CONTRAST = 4.5
"""WCAG 2.2, level AA, for text."""


def solved(parts: Cluster, **options: Any) -> Plan:
    """A proved plan of a tiny model with 24 layers."""
    profile = tiny_profile(num_hidden_layers=24)
    load = options.pop("workload", workload())
    return solve(profile, cluster=parts, workload=load, solvers=("highs",), is_isolated=False, **options)


def lab_plan() -> Plan:
    """Five devices on three hosts behind two switches, several requests in flight."""
    load = workload(requests_in_flight=4, prefill_chunk_tokens=32)
    parts = load_cluster(EXAMPLES / "lab.json")
    return solved(parts, workload=load, use_all=True, execution="process_per_stage", objective="throughput")


def one_host_plan() -> Plan:
    """Eleven devices of one host, all used."""
    parts = cluster(*(device(f"gpu{i}", kind="cuda", budget_bytes=(3 + i % 4) * 2**20) for i in range(11)))
    return solved(parts, use_all=True)


def many_hosts_plan() -> Plan:
    """Nine hosts with long names, a device each; two of them are not used."""
    parts = cluster(
        *(device(f"rack-{i}-of-the-basement/cuda:{i}", kind="cuda", host=f"machine-number-{i}") for i in range(9)),
        links=(class_link("between_hosts", bandwidth=1e9, latency=1e-4),),
    )
    names = [part.name for part in parts.devices]
    layers = ",".join(f"{4 * i if i else 0}-{min(24, 4 * i + 4)}@{name}" for i, name in enumerate(names[:6]))
    return solved(parts, strategy="custom", layers=layers)


PLANS = {"two": make_plan, "lab": lab_plan, "one host": one_host_plan, "many hosts": many_hosts_plan}


@pytest.fixture(scope="module", params=sorted(PLANS))
def plan(request: pytest.FixtureRequest) -> Plan:
    made: Plan = PLANS[request.param]()
    return made


@pytest.fixture(scope="module")
def full_page(plan: Plan) -> str:
    """The page of a plan with everything on it."""
    return render_report(plan, alternatives=_others(plan))


class Page(HTMLParser):
    """Tags balance, ids are unique, and what is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.refers_to: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.words = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.refers_to += [
            value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "action", "data")
        ]
        if tag == "svg" and values.get("role") == "img":
            self.pictures.append(values)
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_whole_and_needs_nothing_else(full_page: str) -> None:
    page = Page(full_page)
    assert not {"script", "img", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not page.refers_to
    assert not re.search(r"https?:|@import|url\((?!#arrow\))|\son\w+=", full_page)
    assert "default-src 'none'" in full_page
    assert len(page.ids) == len(set(page.ids))
    for picture in page.pictures:
        for key in (picture["aria-labelledby"] or "").split():
            assert key in page.ids
    assert len(page.pictures) == 5


def test_the_same_plan_gives_the_same_bytes() -> None:
    plan = make_plan()
    pages = [render_report(plan, alternatives=_others(plan)) for _ in range(2)]
    assert pages[0] == pages[1]
    assert str(Path.home()) not in pages[0]


def _others(plan: Plan) -> Alternatives:
    return alternatives_to(plan, Effort(is_isolated=False))


def test_a_hostile_model_name_stays_text() -> None:
    name = "</title><script>alert('x')</script>&amp;\"' onload=1"
    profile = tiny_profile()
    named = profile.model_copy(update={"model": profile.model.model_copy(update={"name": name})})
    page = Page(render_report(make_plan(profile=named)))
    assert "script" not in page.tags
    assert name in page.words


def test_every_device_of_the_plan_appears_with_its_exact_bytes(plan: Plan) -> None:
    words = Page(render_report(plan)).words
    for stage in plan.stages:
        assert stage.device in words
        for size in (stage.weight_bytes, stage.kv_cache_bytes, stage.total_bytes, stage.budget_bytes):
            assert f"{size:,}" in words
    assert plan.sha256 in words


def test_the_comparison_marks_this_plan_and_says_what_does_not_fit() -> None:
    parts = cluster(
        device("big", kind="cuda"),
        device("small", kind="cuda", budget_bytes=150_000, memory_bandwidth_bytes_per_second=1e8),
    )
    plan = solve(tiny_profile(), cluster=parts, workload=workload(), solvers=("highs",), is_isolated=False)
    others = _others(plan)
    found = others.comparison
    assert found.rows[0].name == "this plan"
    words = Page(render_report(plan, alternatives=others)).words
    assert "What else could be done" in words
    assert "small lacks" in words
    assert found.seconds(found.rows[0]) == pytest.approx(plan.prediction.seconds_per_token)


def _drawings(plan: Plan) -> list[Drawing]:
    simulation = simulate_plan(plan)
    return [
        memory_drawing(plan),
        topology_drawing(plan),
        prefill_drawing(simulation, plan),
        decode_drawing(simulation, plan),
    ]


def test_nothing_is_drawn_outside_its_canvas(plan: Plan) -> None:
    for drawing in _drawings(plan):
        for shape in drawing.shapes:
            if isinstance(shape, Rect):
                assert shape.x >= 0 <= shape.y, (drawing.name, shape)
                assert shape.x + shape.width <= drawing.width + 1, (drawing.name, shape)
                assert shape.y + shape.height <= drawing.height + 1, (drawing.name, shape)
            if isinstance(shape, Text):
                assert 0 <= shape.x <= drawing.width, (drawing.name, shape)
                assert 0 < shape.y <= drawing.height, (drawing.name, shape)


def test_memory_bars_are_as_long_as_the_shares_they_show(plan: Plan) -> None:
    drawing = memory_drawing(plan)
    frames = [shape for shape in drawing.shapes if isinstance(shape, Rect) and shape.css == "free"]
    parts = [shape for shape in drawing.shapes if isinstance(shape, Rect) and not shape.css.startswith("free")]
    for stage, frame in zip(plan.stages, frames, strict=True):
        filled = sum(part.width for part in parts if part.y == frame.y)
        assert filled / frame.width == pytest.approx(stage.total_bytes / stage.budget_bytes)


def test_bars_of_one_track_never_overlap(plan: Plan) -> None:
    for drawing in _drawings(plan)[2:]:
        spans = [shape for shape in drawing.shapes if isinstance(shape, Rect) and shape.css.startswith("span")]
        assert spans
        for top in {span.y for span in spans}:
            row = sorted((span for span in spans if span.y == top), key=lambda span: span.x)
            assert all(a.x + min(a.width, b.x - a.x) <= b.x + 0.01 for a, b in pairwise(row))
            assert all(a.x < b.x for a, b in pairwise(row) if a.width > 2)


def test_devices_of_the_map_stand_apart_and_inside_their_hosts(plan: Plan) -> None:
    layout = lay_out(plan)
    for a, b in combinations(layout.devices.values(), 2):
        is_beside = a.x + a.width <= b.x or b.x + b.width <= a.x
        assert is_beside or a.y + a.height <= b.y or b.y + b.height <= a.y
    for name, box in layout.devices.items():
        host = layout.hosts[plan.cluster.device(name).host]
        assert host.x <= box.x and box.x + box.width <= host.x + host.width  # noqa: PT018
        assert host.y <= box.y and box.y + box.height <= host.y + host.height  # noqa: PT018
    assert {stage.device for stage in plan.stages} <= set(layout.devices)


def test_origins_tell_measured_from_stated_and_assumed() -> None:
    curve = Timings(
        profile="*",
        dtype="bf16",
        path="fast",
        threads=2,
        decode_seconds_per_layer=((128, 1, 1e-5), (256, 1, 2e-5)),
        embedding_seconds=((1, 1e-6),),
        head_seconds=((1, 1e-6),),
    )
    parts = cluster(
        device("a", timings=(curve,)),
        device("b", host="far"),
        device("c"),
        links=(link("local", "far", bandwidth=1e9, latency=1e-3),),
    )
    plan = solve(
        tiny_profile(), cluster=parts, workload=workload(), strategy="custom", layers="0-2@a,2-3@b,3-4@c",
        solvers=("highs",), is_isolated=False,
    )  # fmt: skip
    model = CostModel(plan.profile, workload=plan.workload, cluster=plan.cluster)
    assert [decode_origin(stage, model) for stage in plan.stages] == ["measured", "stated", "stated"]
    assert hop_origin(parts, "a", "b", execution="one_process") == "stated"
    assert hop_origin(parts, "a", "c", execution="one_process") == "assumed"
    by_name = {source.what: source for source in sources_of(plan, model)}
    assert by_name["weights"].origin == "formula"  # a bare configuration
    assert "fast path, 2 threads" in by_name["time on a"].how
    assert "max(bytes / 10 GB/s" in by_name["time on b"].how
    assert by_name["b to c"].origin == "stated"
    assert by_name["the plan"].origin == "stated"  # given by hand, nothing was proved
    assert "2 heads x 8 x 2 bytes = 64 bytes per token" in by_name["KV cache"].how


def test_a_stated_link_that_equals_the_assumption_is_still_stated() -> None:
    usual = cluster(device("a"), device("b"), links=(class_link("same_host", bandwidth=1e12, latency=1e-6),))
    assert hop_origin(usual, "a", "b", execution="one_process") == "stated"


def test_the_trade_off_merges_equal_points_and_draws_the_frontier() -> None:
    found = _others(make_plan()).comparison
    frontier = [Point(0.002, 0.5, "", "point"), Point(0.001, 0.9, "", "point")]
    drawing = tradeoff_drawing(found, frontier=frontier)
    assert drawing is not None
    labels = [shape.text for shape in drawing.shapes if isinstance(shape, Text) and shape.css == "label small"]
    names = [name for label in labels for name in label.split(", ")]
    assert len(names) == len(set(names))
    assert any("frontier" in shape.css for shape in drawing.shapes)
    assert not [shape for shape in drawing.shapes if isinstance(shape, Text) and not 0 <= shape.x <= drawing.width]


def test_a_frontier_of_several_points_is_drawn_and_fewer_devices_are_listed() -> None:
    parts = cluster(
        device("roomy", kind="cuda", memory_bandwidth_bytes_per_second=1e8),
        device("fast", kind="cuda", budget_bytes=500_000, memory_bandwidth_bytes_per_second=1e9),
    )
    plan = solved(parts)
    others = _others(plan)
    shares = [option.memory_share for option in others.by_share]
    assert shares == sorted(shares)
    assert len(shares) > 2
    assert [len(option.stages) for option in others.by_devices] == [1, 2]
    assert others.by_devices[-1].seconds == pytest.approx(plan.prediction.seconds_per_token)
    for row in others.comparison.rows:
        seconds, share = others.comparison.seconds(row), row.max_share
        if row.fits and seconds is not None and share is not None:
            assert not any(share <= o.memory_share and seconds < o.seconds * (1 - 1e-9) for o in others.by_share), row
    text = render_report(plan, alternatives=others)
    assert 'class="frontier"' in text
    assert "The best with at most so many devices" in text


def test_small_helpers() -> None:
    assert (number(1.0), number(-0.001), number(2.345)) == ("1", "0", "2.35")
    assert clipped("abcdefghij", 33) == "abcd…"
    assert nice_ticks(0.0, count=5) == [0.0]
    assert nice_ticks(0.9, count=5) == [0.0, 0.2, 0.4, pytest.approx(0.6), 0.8]
    assert log_ticks(0.011, 0.06) == [pytest.approx(0.02), pytest.approx(0.05)]


def _palettes() -> dict[str, dict[str, str]]:
    blocks = re.findall(r":root \{(.*?)\n *\}", CSS.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks[:2]]
    return {"light": found[0], "dark": found[1]}


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("ink", ["ink", "quiet", "accent", "good", "bad", "warn"])
@pytest.mark.parametrize("ground", ["page", "card", "faint"])
def test_text_has_enough_contrast(scheme: str, ink: str, ground: str) -> None:
    palette = _palettes()[scheme]
    low, high = sorted((_luminance(palette[ink]), _luminance(palette[ground])))
    assert (high + 0.05) / (low + 0.05) >= LEAST_CONTRAST


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_on_the_badge_has_enough_contrast(scheme: str) -> None:
    palette = _palettes()[scheme]
    low, high = sorted((_luminance(palette["accent"]), _luminance(palette["accent-ink"])))
    assert (high + 0.05) / (low + 0.05) >= LEAST_CONTRAST


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")


@needs_chromium
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 420)])
def test_a_browser_shows_it_without_complaint_and_no_text_is_cut_off_or_covered(
    full_page: str, scheme: str, width: int, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text(full_page, encoding="utf-8")
    seen = open_page(path, scheme=scheme, width=width, measures=True)
    assert seen.console == []
    assert seen.corner == _palettes()[scheme]["page"]
    assert seen.problems == []


@needs_chromium
def test_the_browser_tests_notice_what_they_look_for(tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    texts = (
        '<text x="10" y="10">one over</text><text x="14" y="12">the other</text><text x="90" y="40">out of it</text>'
    )
    path.write_text(
        f'<title>x</title><body style="background:#fff"><svg role="img" viewBox="0 0 100 50" width="100">{texts}</svg>'
        '<div style="width:5000px">wide</div><script>undefined_name()</script></body>',
        encoding="utf-8",
    )
    seen = open_page(path, scheme="light", measures=True)
    assert any("undefined_name" in line for line in seen.console)
    assert {problem.split(":")[0] for problem in seen.problems} == {"outside", "overlap", "sideways"}


def test_the_command_writes_the_page_and_the_trace(run_command: RunCommand, tmp_path: Path) -> None:
    plan, page, trace = (tmp_path / name for name in ("plan.json", "report.html", "trace.json"))
    plan.write_text(make_plan().to_json(), encoding="utf-8")
    done = run_command("llamaplan", "report", plan, "-o", page, "--trace", trace, "--no-compare")
    assert done.code == 0, done.err
    assert "next:" in done.err
    assert "What else could be done" not in page.read_text(encoding="utf-8")
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    asked = run_command("llamaplan", "report", plan, "-o", page, "--json", "--no-compare")
    assert json.loads(asked.out) == {"report": str(page), "trace": None}


def test_the_command_compares_unless_told_not_to(run_command: RunCommand, tmp_path: Path) -> None:
    plan, page = tmp_path / "plan.json", tmp_path / "report.html"
    plan.write_text(make_plan().to_json(), encoding="utf-8")
    assert run_command("llamaplan", "report", plan, "-o", page, "-q").code == 0
    assert "vllm" in page.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_the_machines_fault(run_command: RunCommand, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(make_plan().to_json(), encoding="utf-8")
    done = run_command("llamaplan", "report", plan, "-o", tmp_path / "no" / "such" / "r.html", "--no-compare")
    assert done.code == ExitCode.ENVIRONMENT
    done = run_command("llamaplan", "report", plan, "--time-limit", "0")
    assert done.code == ExitCode.USAGE


def test_a_report_never_overwrites_its_plan(run_command: RunCommand, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(make_plan().to_json(), encoding="utf-8")
    for arguments in (("-o", plan), ("-o", tmp_path / "a", "--trace", tmp_path / "a")):
        done = run_command("llamaplan", "report", plan, *arguments, "--no-compare")
        assert done.code == ExitCode.USAGE
        assert "three different files" in done.err
    assert plan.read_text(encoding="utf-8") == make_plan().to_json()
