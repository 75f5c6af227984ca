"""Strategies and rules side by side: fair scores, honest shortfalls, and no rule that beats the planner."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.rivals.compare import Comparison, DeviceUse, Row, compare, memory_use
from planner.rivals.rules import RULES, Split, chain_of, from_partition
from planner.show.compare import comparison_table, layers_text, verdict
from planner.timing.costs import CostModel
from plans.cluster import Cluster
from plans.errors import UsageError
from plans.plan import Objective
from plans.stages import StageRange
from tests.conftest import SHIPPED, RunCommand
from tests.planner.cases import asked, class_link, cluster, device, link, make_plan, tiny_profile, workload

FAST: dict[str, Any] = {"solvers": ("highs",), "is_isolated": False}
PRECISION = 1e-9
SIMULATED_PERIOD_PRECISION = 2e-6
TICK_SECONDS = 1e-12


@st.composite
def questions(draw: st.DrawFn) -> dict[str, Any]:
    """A tiny model on up to four devices of unlike speed and memory; a CPU, far hosts and slow links now and then."""
    profile = tiny_profile(
        num_hidden_layers=draw(st.integers(1, 7)),
        vocab_size=draw(st.sampled_from([16, 64, 600])),
        tie_word_embeddings=draw(st.booleans()),
    )
    load = workload(
        requests_in_flight=draw(st.sampled_from([1, 2, 5])),
        batch_size=draw(st.integers(1, 2)),
        new_tokens=draw(st.sampled_from([0, 1, 64])),
        prefill_chunk_tokens=draw(st.sampled_from([32, 128])),
    )
    whole = profile.total_weight_bytes + 270_000  # weights, caches and workspaces of this workload, roughly
    devices = []
    for index in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["cuda", "cuda", "cuda", "cpu"])) if index else "cuda"
        budget = int(whole * draw(st.sampled_from([0.2, 0.5, 0.8, 1.5])))
        rate = draw(st.sampled_from([1e8, 3e8, 1e9, 1e10]))
        host = draw(st.sampled_from(["near", "near", "far"]))
        devices.append(
            device(f"d{index}", kind=kind, budget_bytes=budget, memory_bandwidth_bytes_per_second=rate, host=host)
        )
    links = (
        class_link("same_host", bandwidth=1e10, latency=draw(st.sampled_from([0.0, 1e-5]))),
        class_link("between_hosts", bandwidth=draw(st.sampled_from([1e6, 1e9])), latency=1e-4),
    )
    return {"profile": profile, "workload": load, "cluster": cluster(*devices, links=links)}


@given(questions(), st.sampled_from(["latency", "request", "throughput"]))
@settings(max_examples=60)
def test_no_rule_beats_the_planner(question: dict[str, Any], objective: Objective) -> None:
    profile = question.pop("profile")
    found = compare(*asked(profile, **question, objective=objective, **FAST))
    ours = next(row for row in found.rows if row.name == "compute")
    rivals = [row for row in found.rows if row.kind == "rule" and row.fits and not row.has_repeats]
    if not ours.fits:
        assert not rivals, "a rule found a plan where the planner says there is none"
        return
    assert ours.status == "optimal"
    best = found.seconds(ours)
    assert best is not None
    steps = 1 + question["workload"].new_tokens * (objective == "request")
    rounding = TICK_SECONDS * len(profile.units) * 10 * steps
    relative = SIMULATED_PERIOD_PRECISION if objective == "throughput" else PRECISION
    for row in rivals:
        seconds = found.seconds(row)
        assert seconds is not None
        assert best <= seconds * (1 + relative) + rounding, row


def test_the_property_above_meets_rules_that_fit_and_rules_that_do_not() -> None:
    seen = {"fits": 0, "short": 0, "no chain": 0, "repeats": 0}

    @given(questions())
    @settings(max_examples=40, database=None, derandomize=True)
    def look(question: dict[str, Any]) -> None:
        referee = CostModel(question["profile"], workload=question["workload"], cluster=question["cluster"])
        for rule in RULES.values():
            split = rule(question["profile"], question["cluster"])
            if split.reason:
                seen["no chain"] += 1
                continue
            seen["repeats"] += len({stage.device for stage in split.stages}) < len(split.stages)
            fits = not any(use.missing_bytes for use in memory_use(referee, split.stages))
            seen["fits" if fits else "short"] += 1

    look()
    assert min(seen.values()) > 0, seen


def tight() -> tuple[Any, Cluster, Any]:
    """Four layers, two GPUs: a large fast one and one that holds no more than a layer and an end."""
    profile, load = tiny_profile(), workload()
    parts = cluster(
        device("big", kind="cuda"),
        device("small", kind="cuda", budget_bytes=150_000, memory_bandwidth_bytes_per_second=1e8),
    )
    return profile, parts, load


def row_of(found: Comparison, name: str) -> Row:
    return next(row for row in found.rows if row.name == name)


def test_what_does_not_fit_says_where_and_by_how_much() -> None:
    profile, parts, load = tight()
    found = compare(*asked(profile, cluster=parts, workload=load, **FAST))
    assert row_of(found, "compute").fits
    vllm = row_of(found, "vllm")
    assert [stage.end_layer - stage.start_layer for stage in vllm.stages] == [2, 2]
    assert not vllm.fits
    [use] = [use for use in vllm.use if use.missing_bytes]
    assert use.device == "small"
    assert use.missing_bytes == use.used_bytes - 150_000
    assert verdict(vllm).startswith("small lacks ")
    assert found.best is not None
    assert found.best.fits


def test_a_plan_of_ours_is_scored_as_it_predicts() -> None:
    plan = make_plan(workload=workload(requests_in_flight=2))
    found = compare(
        *asked(plan.profile, cluster=plan.cluster, workload=plan.workload, **FAST),
        partitions=[("mine", Split("mine", plan.ranges))],
    )
    mine = row_of(found, "mine")
    assert mine.score is not None
    assert mine.score.seconds_per_token == pytest.approx(plan.prediction.seconds_per_token)
    assert mine.max_share == pytest.approx(plan.prediction.max_memory_share)
    assert [use.used_bytes for use in mine.use] == [stage.total_bytes for stage in plan.stages]


def test_a_device_that_holds_both_ends_of_a_tied_model_pays_for_one_table() -> None:
    profile, load = tiny_profile(tie_word_embeddings=True), workload()
    referee = CostModel(profile, workload=load, cluster=cluster(device("a", kind="cuda"), device("b", kind="cuda")))

    def used(stages: Sequence[StageRange]) -> dict[str, int]:
        return {use.device: use.used_bytes for use in memory_use(referee, stages)}

    around = used(chain_of(["a", "b", "b", "b", "b", "a"]))
    apart = used(chain_of(["a", "b", "b", "b", "b", "b"]))
    norm = profile.head.weight_bytes - profile.embedding.weight_bytes
    head_workspace = around["a"] - apart["a"] - norm
    assert 0 < head_workspace < profile.embedding.weight_bytes
    assert apart["b"] - around["b"] >= profile.head.weight_bytes


def test_devices_that_are_not_connected_are_a_reason_not_a_crash() -> None:
    parts = cluster(
        device("a", kind="cuda", host="x"),
        device("b", kind="cuda", host="y"),
        device("c", kind="cuda", host="z"),
        links=(link("x", "z", bandwidth=1e9, latency=0.0),),
    )
    found = compare(*asked(tiny_profile(), cluster=parts, workload=workload(), **FAST))
    assert "no link leads from a" in row_of(found, "vllm").reason
    assert row_of(found, "compute").fits
    assert not row_of(found, "vllm").fits


def test_llama_cpp_offloads_as_many_layers_as_fit() -> None:
    parts = cluster(device("g", kind="cuda", budget_bytes=200_000), device("cpu"))
    found = compare(*asked(tiny_profile(), cluster=parts, workload=workload(), **FAST))
    row = row_of(found, "llama.cpp")
    assert row.fits
    assert row.note.startswith("with -ngl ")
    assert [stage.device for stage in row.stages] == ["cpu", "g"]


def test_uniform_shows_its_even_split_even_where_it_does_not_fit() -> None:
    profile, parts, load = tight()
    row = row_of(compare(*asked(profile, cluster=parts, workload=load, **FAST)), "uniform")
    assert [stage.end_layer - stage.start_layer for stage in row.stages] == [2, 2]
    assert not row.fits
    assert "small lacks" in verdict(row)


def test_words_of_a_row() -> None:
    assert layers_text(chain_of(["cpu", "g", "g", "g", "g", "h"])) == "cpu embedding, g 4, h head"
    many = chain_of([f"d{i}" for i in range(9)])
    assert layers_text(many) == "9 stages: 0,1,1,1,1,1,1,1,0"
    assert DeviceUse("a", 5, 0).share == float("inf")


def test_the_table_has_a_row_for_every_strategy_rule_and_partition() -> None:
    profile, parts, load = tight()
    given_split = from_partition("vllm", [(0, 3), (3, 4)], cluster=parts)
    found = compare(*asked(profile, cluster=parts, workload=load, **FAST), partitions=[("vllm:3,1", given_split)])
    names = [row.name for row in found.rows]
    assert names == ["compute", "memory", "mixed", "uniform", *RULES, "vllm:3,1"]
    assert comparison_table(found).row_count == len(names) + 2  # and two empty rows between the kinds


def test_the_command_compares_and_its_json_says_the_same(run_command: RunCommand) -> None:
    devices = ("--device", "rtx3090=1GiB", "--device", "rtx3060=1GiB")
    done = run_command("llamaplan", "compare", SHIPPED, *devices, "--partition", "vllm:5,2", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["best"] == "compute"
    rows = {row["name"]: row for row in document["rows"]}
    assert [stage["end_layer"] for stage in rows["vllm:5,2"]["stages"]] == [5, 7]
    assert all(row["fits"] or row["reason"] or row["devices"] for row in document["rows"])
    assert rows["compute"]["objective_seconds"] <= rows["vllm"]["objective_seconds"]


def test_a_plan_is_compared_under_its_own_question(run_command: RunCommand, tmp_path: Path) -> None:
    plan, devices = tmp_path / "plan.json", ("--device", "cpu=400MiB", "--device", "rtx4090=610MiB")
    asked = (*devices, "--ban", "4-5@cpu", "--objective", "throughput", "--requests-in-flight", 2)
    assert run_command("llamaplan", "solve", SHIPPED, *asked, "--layers", "3,4", "-o", plan).code == 0
    document = json.loads(run_command("llamaplan", "compare", plan, "--json").out)
    rows = document["rows"]
    assert document["objective"] == "throughput"
    assert [row["name"] for row in rows[:2]] == ["this plan", "compute"]
    assert [stage["end_layer"] for stage in rows[0]["stages"]] == [3, 7]
    for row in rows[1:3]:  # the ban still holds, the cut does not
        assert all(stage["device"] == "rtx4090" or stage["end_layer"] <= 4 for stage in row["stages"])


def test_a_plan_cannot_be_compared_under_another_question(run_command: RunCommand, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert run_command("llamaplan", "solve", SHIPPED, "--device", "cpu=1GiB", "-o", plan).code == 0
    for other in (("--batch-size", 4), ("--device", "cpu=2GiB"), ("--objective", "request")):
        done = run_command("llamaplan", "compare", plan, *other)
        assert (done.code, other[0] in done.err) == (UsageError.exit_code, True), done.err


def test_a_partition_that_is_none_is_a_usage_error(run_command: RunCommand) -> None:
    done = run_command("llamaplan", "compare", SHIPPED, "--device", "cpu=1GiB", "--partition", "vllm:3,3")
    assert done.code == UsageError.exit_code
    assert "has 6 layers, the model has 7" in done.err
