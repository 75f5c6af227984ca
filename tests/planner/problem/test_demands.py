"""What a user fixes by hand, read strictly."""

from collections.abc import Iterable

import pytest

from planner.problem.demands import Terms, read_demands
from planner.problem.problem import Rule, StageChoice
from plans.errors import UsageError
from plans.plan import Demands

NAMES = ("cuda:0", "cuda:1", "cpu")


def read(*, pins: Iterable[str] = (), bans: Iterable[str] = (), layers: str | None = None) -> Terms:
    return read_demands(Demands(pins=tuple(pins), bans=tuple(bans), layers=layers), names=NAMES, num_layers=32)


def test_complete_counts_are_a_chain_over_the_first_devices() -> None:
    assert read(layers="18,10,4").given == (
        StageChoice(0, 0, 18), StageChoice(1, 18, 28), StageChoice(2, 28, 32),
    )  # fmt: skip
    assert read(layers="0,32").given == (StageChoice(0, 0, 0), StageChoice(1, 0, 32))


def test_complete_ranges_are_a_chain_in_the_order_written() -> None:
    given = read(layers="0-16@cpu,16-32@cuda:0").given
    assert given == (StageChoice(2, 0, 16), StageChoice(0, 16, 32))


def test_open_counts_fix_the_rest_and_leave_other_devices_out() -> None:
    demands = read(layers="18,*")
    assert demands.given is None
    assert demands.keep_order
    assert demands.rules["cuda:0"] == Rule(is_required=True, min_layers=18, max_layers=18)
    assert demands.rules["cuda:1"] == Rule(is_required=True)
    assert demands.rules["cpu"] == Rule(is_banned=True)


def test_a_range_alone_fixes_one_stage() -> None:
    demands = read(layers="4-16@cuda:1")
    assert demands.given is None
    assert demands.rules == {"cuda:1": Rule(is_required=True, max_start=4, min_end=16, min_layers=12, max_layers=12)}


def test_pins_add_up_and_bans_take_away() -> None:
    demands = read(pins=["0-4@cuda:0", "9@cuda:0", "head@cpu"], bans=["cuda:1", "5-7@cpu", "embedding@cpu"])
    assert demands.rules["cuda:0"] == Rule(is_required=True, max_start=0, min_end=10)
    assert demands.rules["cpu"] == Rule(is_required=True, head=True, embedding=False, banned=frozenset({5, 6}))
    assert demands.rules["cuda:1"] == Rule(is_banned=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": "18,10"}, "adds up to 28, the model has 32"),
        ({"layers": "18,10,4,0"}, "4 stages, there are 3"),
        ({"layers": "16,0,16"}, "empty"),
        ({"layers": "40,*"}, "adds up to 40"),
        ({"layers": "16,-16"}, "not understood"),
        ({"layers": "16.0,16"}, "not understood"),
        ({"layers": ""}, "not understood"),
        ({"layers": "0-16@cuda:7"}, "no device here"),
        ({"layers": "0-16@cpu,16-32@cpu"}, "twice"),
        ({"layers": "0-16@cpu,8-32@cuda:0"}, "overlaps"),
        ({"layers": "0-33@cpu"}, "no range"),
        ({"layers": "8-8@cpu"}, "no range"),
        ({"layers": "0-16@cpu,x"}, "not understood"),
        ({"pins": ["0-4"]}, "not understood"),
        ({"pins": ["0-4@gpu"]}, "no device here"),
        ({"pins": ["4-4@cpu"]}, "no range"),
        ({"pins": ["30-33@cpu"]}, "no range"),
        ({"pins": ["tail@cpu"]}, "not understood"),
        ({"pins": ["0-4@cpu", "3@cuda:0"]}, "layer 3"),
        ({"pins": ["0@cpu"], "bans": ["cpu"]}, "both demanded and banned"),
        ({"bans": ["tpu"]}, "no device here"),
        ({"bans": ["tail@cpu"]}, "not understood"),
    ],
)
def test_malformed_demands_are_usage_errors(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read(**options)  # type: ignore[arg-type]
