"""The terminal picture of a plan."""

from typing import Any

import pytest
from rich.console import Console

from planner.show import plan as show
from planner.show.words import duration
from plans.plan import Demands, Plan, Proof, Stage, TradeOff
from tests.planner.cases import make_plan


def _rendered(renderable: object, *, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def _stage(**sizes: int) -> Stage:
    known = {"weight_bytes": 0, "kv_cache_bytes": 0, "activation_bytes": 0, "overhead_bytes": 0, "budget_bytes": 100}
    return make_plan().stages[0].model_copy(update=known | sizes)


def _sizes(weights: int, cache: int, work: int, overhead: int) -> dict[str, int]:
    keys = ("weight_bytes", "kv_cache_bytes", "activation_bytes", "overhead_bytes")
    return dict(zip(keys, (weights, cache, work, overhead), strict=True))


@pytest.mark.parametrize(
    ("sizes", "bar"),
    [
        (_sizes(0, 0, 0, 0), "·" * 20),
        (_sizes(100, 0, 0, 0), "█" * 20),
        (_sizes(50, 25, 10, 5), "█" * 10 + "▓▓▓▓▓▒▒░··"),
        (_sizes(33, 33, 33, 1), "█" * 7 + "▓" * 6 + "▒" * 7),
    ],
)
def test_bar_always_has_all_its_cells(sizes: dict[str, int], bar: str) -> None:
    text = show.memory_bar(_stage(**sizes), cells=20).plain
    assert len(text) == 20
    assert text == bar


def test_table_fits_eighty_columns_and_names_every_stage() -> None:
    plan = make_plan()
    text = _rendered(show.stage_table(plan), width=80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "emb + 0-2" in text
    assert "3 + head" in text
    assert "…" not in text


def test_lines_say_chain_times_proof_and_what_was_left_out() -> None:
    plan = make_plan()
    lines = list(show.summary_lines(plan))
    assert lines[0].startswith("chain: a -")
    assert lines[0].endswith("back to a")
    assert "per token" in lines[1]
    assert lines[-1] == "given by hand: 0 us per token; checked, not optimised"


def _with_proof(plan: Plan, **changes: object) -> Plan:
    known = {"status": "optimal", "objective": 0.25, "bound": 0.25, "gap": 0.0, "solver": "HiGHS"}
    known |= {"solver_version": "1.16.0", "certified_by": "Held-Karp over device groups"}
    return plan.model_copy(update={"proof": Proof(**(known | changes))})  # type: ignore[arg-type]


def test_proof_says_who_proved_what() -> None:
    plan = make_plan()
    proved = show.proof_line(_with_proof(plan))
    assert proved == "optimal: 250 ms per token, proved by HiGHS 1.16.0 and again by Held-Karp over device groups"
    alone = show.proof_line(_with_proof(plan, certified_by=None))
    assert "no second method reaches this size" in alone
    open_ = show.proof_line(_with_proof(plan, status="feasible", bound=0.2, gap=0.2, certified_by=None))
    least = "HiGHS 1.16.0 excludes less than 200 ms per token (gap 20.00%)"
    assert open_ == f"feasible, not proved: 250 ms per token; {least}"


@pytest.mark.parametrize(
    ("demands", "line"),
    [
        (
            {"pins": ("embedding@cpu", "0-4@cuda:0", "7@cpu"), "bans": ("t4:3", "0-2@cpu")},
            "embedding on cpu, layers 0-3 on cuda:0, layer 7 on cpu, not t4:3, not layers 0-1 on cpu",
        ),
        ({"layers": "18,10,4", "keep_order": True}, "layers 18,10,4, devices in their order"),
        ({"layers": "0-16@cuda:0,16-32@cpu"}, "layers 0-15 on cuda:0, layers 16-31 on cpu"),
        ({"layers": "0-0@cpu,0-4@a", "use_all": True}, "no layer on cpu, layers 0-3 on a, every device"),
        ({"bans": ("\x1b[31m",)}, "not \\x1b[31m"),
    ],
)
def test_demands_are_said_in_one_line(demands: dict[str, Any], line: str) -> None:
    plan = make_plan().model_copy(update={"demands": Demands(**demands)})
    assert f"asked for: {line}" in list(show.summary_lines(plan))


def test_trade_off_and_unused_devices_are_named() -> None:
    trade = TradeOff(best_time_seconds=0.1, best_memory_share=0.5, time_given_up=0.25, memory_share_given_up=0.1)
    plan = make_plan().model_copy(update={"trade_off": trade})
    one = plan.model_copy(update={"stages": plan.stages[:1]})
    text = "\n".join(show.summary_lines(one))
    assert "mixed gives up 25.0% of time (best alone 100 ms) and 10.0% of memory share (best alone 50.0%)" in text
    assert "not used: b" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0 us"), (1.5e-5, "15 us"), (0.0123456, "12.35 ms"), (2.5, "2.5 s"), (1234.5, "1234 s")]
)
def test_times_are_printed_in_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_json_holds_the_plan_and_what_only_this_run_knows() -> None:
    plan = make_plan()
    document = show.as_json(plan, solve_seconds=0.5)
    assert document["solve_seconds"] == 0.5
    assert document["unused_devices"] == []
    assert document["stages"][0]["device"] == "a"
