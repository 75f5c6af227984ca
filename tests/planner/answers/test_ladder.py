"""The ladder: against every mix and cut of small models, against every rung, and what it says when nothing fits."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations, product
from typing import Any

import pytest

from planner.answers import ladder as ladder_module
from planner.answers.ladder import Ladder, best_of_ladder, least_sensitive
from planner.answers.solve import objective_seconds
from planner.answers.solve import solve as solve_question
from planner.model.profile import build_profile
from planner.model.widths import mixed, narrower_than
from planner.problem.problem import Assignment, Problem, StageChoice
from planner.problem.question import Question
from planner.program.effort import Effort
from plans.cluster import Cluster, Timings
from plans.errors import InfeasibleError, IntegrityError
from plans.profile import ModelProfile
from plans.sensitivity import Sensitivity, SensitivitySubject, read_sensitivity
from tests.planner.cases import EVEN, bare, class_link, cluster, device, workload
from tests.planner.worth import is_allowed, worth_of

QUICK = Effort(("highs",), is_isolated=False)
LOAD = workload(prompt_tokens=8, new_tokens=8, context_tokens=64, prefill_chunk_tokens=8)
LAYERS = 5
MOST_BEHIND = 1.15
"""The ladder against the joint optimum."""


def sensitivity(int4: tuple[float, ...], *, int8: float = 1e-4, **changes: Any) -> Sensitivity:
    subject = SensitivitySubject(
        name="tiny", config_sha256="0" * 64, shards=(), num_hidden_layers=len(int4), dtype="bf16",
        text_sha256="1" * 64, num_tokens=64, window_tokens=64,
    )  # fmt: skip
    return Sensitivity(**({"subject": subject, "int8": int8, "head_int8": 1e-5, "int4": int4} | changes))


def question(parts: Cluster, layers: int = LAYERS, **changes: Any) -> Question:
    checkpoint = bare(**EVEN | {"num_hidden_layers": layers})
    plain = build_profile(checkpoint)
    return Question(plain, parts, LOAD, narrower=narrower_than(checkpoint, plain, None), **changes)


def drawn(seed: int) -> tuple[Question, Sensitivity, float]:
    """Three unlike devices with links, too small for the model as it is stored; sensitivities and a budget."""
    draw = random.Random(seed)
    whole = question(cluster(device("x")))
    small, large = (p.profile.total_weight_bytes for p in (whole.narrower[1], whole.narrower[0]))
    room = draw.uniform(1.2 * small, 1.5 * large)
    shares = [draw.uniform(0.25, 0.6) for _ in range(3)]
    parts = cluster(
        *(
            device(name, budget_bytes=int(share * room) + 20_000,
                   memory_bandwidth_bytes_per_second=10 ** draw.uniform(9, 10))
            for name, share in zip("abc", shares, strict=True)
        ),
        links=(class_link("same_host", bandwidth=1e9, latency=draw.uniform(1e-7, 1e-5)),),
    )  # fmt: skip
    found = sensitivity(tuple(10 ** draw.uniform(-4, -1) for _ in range(LAYERS)), int8=2e-4)
    return replace(whole, cluster=parts), found, draw.uniform(2e-4, sum(found.int4))


def chains(problem: Problem) -> Iterator[Assignment]:
    """Every order of every set of devices, with every cut."""
    size = problem.num_layers
    for count in range(1, problem.num_devices + 1):
        for order in permutations(range(problem.num_devices), count):
            for cuts in combinations(range(size + count - 1), count - 1):
                edges = [0, *(cut - index for index, cut in enumerate(cuts)), size]
                chain = tuple(StageChoice(d, edges[i], edges[i + 1]) for i, d in enumerate(order))
                if is_allowed(problem, chain):
                    yield chain


def best_seconds(problem: Problem) -> float | None:
    found = [worth_of(problem, chain, objective="latency").time for chain in chains(problem)]
    return min(found) * problem.tick_seconds if found else None


def joint_optimum(asked: Question, known: Sensitivity, budget: float) -> float | None:
    """The least seconds per token over all mixes of 4 and 8 bits within the budget, and all cuts."""
    eight, four = asked.narrower
    best: float | None = None
    for bits in product((4, 8), repeat=LAYERS):
        found = mixed(eight, four, {index for index, width in enumerate(bits) if width == 4})
        if known.expected(found.choice) <= budget:
            seconds = best_seconds(asked.packed(found).problem())
            best = seconds if best is None or (seconds is not None and seconds < best) else best
    return best


def climb(asked: Question, known: Sensitivity, budget: float, effort: Effort = QUICK) -> Any:
    return best_of_ladder(Ladder(asked, known, budget=budget), effort)


@pytest.mark.parametrize("seed", [1, 7, 22])
def test_the_ladder_comes_close_to_the_best_mix_and_cut_there_is(seed: int) -> None:
    asked, known, budget = drawn(seed)
    joint = joint_optimum(asked, known, budget)
    assert joint is not None
    found = climb(asked, known, budget)
    assert joint * (1 - 1e-6) <= objective_seconds(found.best) <= joint * MOST_BEHIND
    assert (found.best.proof.status, found.is_complete) == ("optimal", True)


def test_rungs_are_the_least_sensitive_layers_first_and_their_errors_add_up() -> None:
    known = sensitivity((0.3, 0.1, 0.2, 0.1, 0.4), int8=0.011)
    assert least_sensitive(known) == [1, 3, 2, 0, 4]
    ladder = Ladder(question(cluster(device("a"))), known, budget=0.25)
    choices = [rung.question.weights for rung in ladder.rungs]
    assert [c.layer_bits for c in choices if c][2:4] == [(8, 4, 8, 4, 8), (8, 4, 4, 4, 8)]
    eighths = [0.011 * error / 1.1 for error in known.int4]
    assert ladder.rungs[2].error == pytest.approx(0.2 + eighths[0] + eighths[2] + eighths[4] + 1e-5)
    assert [rung.name for rung in ladder.allowed] == ["bf16", "int8", "int4 (1) and int8 (4)", "int4 (2) and int8 (3)"]
    (recorded,) = {(c.error.budget, c.error.sensitivity_sha256) for c in choices if c and c.error}
    assert recorded == (0.25, known.sha256)


@pytest.mark.parametrize("strategy", ["compute", "uniform"])
def test_the_shortcut_finds_what_solving_every_rung_finds(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, known, _budget = drawn(7)
    asked = replace(asked, strategy=strategy)
    for budget in (known.expected(asked.narrower[0].choice), 0.4 * sum(known.int4), 1.1 * sum(known.int4)):
        quick = _answer(asked, known, budget)
        with monkeypatch.context() as patched:
            patched.setattr(ladder_module, "never_worse", lambda _ours, _theirs: False)
            assert _answer(asked, known, budget) == quick


def _answer(asked: Question, known: Sensitivity, budget: float) -> Any:
    try:
        found = climb(asked, known, budget)
    except InfeasibleError as error:
        return error.line()
    return objective_seconds(found.best), found.error


def test_a_bigger_budget_is_never_slower() -> None:
    asked, known, _budget = drawn(22)
    budgets = [share * sum(known.int4) for share in (0.1, 0.3, 0.6, 1.1)]
    seconds = [objective_seconds(climb(asked, known, budget).best) for budget in budgets]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[0]


def test_only_what_decides_is_solved_where_fewer_bits_are_never_slower() -> None:
    known = sensitivity((0.3, 0.1, 0.2, 0.1, 0.4))
    found = climb(question(cluster(device("a"))), known, 0.5)
    assert (found.num_allowed, found.num_rungs) == (5, 7)
    assert found.num_solved < found.num_allowed
    assert [answer.rung.name for answer in found.uniform] == ["bf16", "int8", "int4"]
    assert all(answer.plan is not None for answer in found.uniform)
    times = [objective_seconds(a.plan) for a in found.uniform if a.plan]
    assert times[0] > times[1] > objective_seconds(found.best) > times[2]


def test_where_four_bits_were_measured_to_be_slower_every_rung_is_solved_and_the_fastest_taken() -> None:
    known = sensitivity((0.3, 0.1, 0.2, 0.1, 0.4))
    asked = question(cluster(device("a")))
    shape = asked.profile.layers[0].shapes_sha256
    curves = [Timings(profile=shape, dtype="bf16", weights=name, decode_seconds_per_layer=((12, 1, seconds),))
              for name, seconds in (("int4", 3e-4), ("int8", 2e-4), (None, 5e-4))]  # fmt: skip
    slow = replace(asked, cluster=cluster(device("a", timings=tuple(curves))))
    found = climb(slow, known, 5.0)
    assert (found.num_solved, found.num_allowed) == (7, 7)
    assert found.best.weights is not None
    assert found.best.weights.kind == "int8"


def test_of_equally_fast_rungs_that_with_the_least_error_is_taken() -> None:
    known = sensitivity((0.3, 0.1, 0.2, 0.1, 0.4))
    asked = question(cluster(device("a")))
    shape = asked.profile.layers[0].shapes_sha256
    alike = [Timings(profile=shape, dtype="bf16", weights=name, decode_seconds_per_layer=((12, 1, seconds),))
             for name, seconds in (("int4", 2e-4), ("int8", 2e-4), (None, 5e-4))]  # fmt: skip
    found = climb(replace(asked, cluster=cluster(device("a", timings=tuple(alike)))), known, 5.0)
    assert found.best.weights is not None
    assert found.best.weights.kind == "int8"


def test_below_the_error_of_eight_bits_the_model_stays_as_it_is() -> None:
    known = sensitivity((0.3, 0.1, 0.2, 0.1, 0.4), int8=0.01)
    found = climb(question(cluster(device("a"))), known, 0.001)
    assert (found.best.weights, found.error, found.num_allowed) == (None, 0.0, 1)


def test_a_budget_in_which_nothing_fits_is_told_the_least_that_would_do() -> None:
    asked, known, _budget = drawn(22)
    small = solve_question(replace(asked, cluster=cluster(device("a"))).packed(asked.narrower[1]), QUICK)
    tight = replace(asked, cluster=cluster(device("a", budget_bytes=small.stages[0].total_bytes)))
    with pytest.raises(InfeasibleError) as refused:
        climb(tight, known, 0.01)
    enough = float(refused.value.hint.split()[1])
    assert "the first that does has layers in int4" in refused.value.what
    assert climb(tight, known, enough).error <= enough
    none = replace(asked, cluster=cluster(device("a", budget_bytes=50_000)))
    with pytest.raises(InfeasibleError, match="the smallest shortage"):
        climb(none, known, 5.0)


def test_without_time_nothing_is_claimed() -> None:
    known = sensitivity((0.3, 0.1, 0.2, 0.1, 0.4))
    with pytest.raises(InfeasibleError) as refused:
        climb(question(cluster(device("a"))), known, 5.0, replace(QUICK, time_limit=0.0))
    assert refused.value.code == "E-TIME"


def test_sensitivities_of_another_model_are_refused(tmp_path: Any) -> None:
    profile: ModelProfile = question(cluster(device("a"))).profile
    known = sensitivity((0.1,) * LAYERS)
    path = tmp_path / "sens.json"
    path.write_text(known.to_json(), encoding="utf-8")
    assert read_sensitivity(path, profile) == known
    other = profile.model_copy(update={"model": profile.model.model_copy(update={"config_sha256": "2" * 64})})
    with pytest.raises(IntegrityError, match="the model to plan is tiny"):
        read_sensitivity(path, other)
