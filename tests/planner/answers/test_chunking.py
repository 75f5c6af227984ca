"""The chunk size that the planner chooses is the best of all for its own cut, and never harms the plan."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.answers.chunking import LEAST_CHUNK_TOKENS, best_chunk, candidate_chunks, solve_with_best_chunk
from planner.answers.solve import solve
from planner.problem.question import Question
from planner.program.effort import Effort
from planner.report.page import render_report
from plans.cluster import Cluster
from plans.workload import Workload
from tests.conftest import SHIPPED, RunCommand
from tests.planner.cases import asked, cluster, device, link, make_plan, tiny_profile, workload

SLOW = {"flops_per_second": {"bf16": 1e8}, "memory_bandwidth_bytes_per_second": 1e9}


def two(**changes: object) -> Cluster:
    wire = link("a", "b", bandwidth=1e9, latency=1e-5)
    return cluster(device("a", **SLOW, **changes), device("b", **SLOW, **changes), links=(wire,))


def ask(parts: Cluster, load: Workload) -> tuple[Question, Effort]:
    return asked(
        tiny_profile(), cluster=parts, workload=load, execution="process_per_stage", use_all=True, is_isolated=False
    )


@given(st.integers(1, 100_000))
def test_candidates_go_from_the_whole_prompt_down_to_small_chunks(prompt: int) -> None:
    sizes = candidate_chunks(prompt)
    assert sizes[0] == prompt
    assert list(sizes) == sorted(set(sizes), reverse=True)
    assert all(size >= LEAST_CHUNK_TOKENS for size in sizes[1:])
    assert len(sizes) < 40


def test_processes_take_the_prompt_in_chunks_where_that_helps() -> None:
    load = workload(prompt_tokens=256, prefill_chunk_tokens=256, new_tokens=8)
    whole, chosen = solve(*ask(two(), load)), solve_with_best_chunk(*ask(two(), load))
    assert chosen.workload.prefill_chunk_tokens == best_chunk(chosen) < 256
    assert chosen.prediction.time_to_first_token_seconds < 0.8 * whole.prediction.time_to_first_token_seconds
    assert chosen.prediction.seconds_per_token <= whole.prediction.seconds_per_token
    assert f"256 tokens in {len(chosen.workload.prefill_chunks)} chunks" in render_report(chosen)


def test_in_one_process_by_the_roofline_the_prompt_is_taken_whole() -> None:
    plan = make_plan(workload=workload(prompt_tokens=256, prefill_chunk_tokens=64))
    assert best_chunk(plan) == 256


def test_a_workspace_that_does_not_fit_is_no_choice() -> None:
    load = workload(prompt_tokens=256, prefill_chunk_tokens=256, new_tokens=8)
    needed = max(stage.total_bytes for stage in solve(*ask(two(), load)).stages)
    tight = two(budget_bytes=needed - 40_000)
    with pytest.raises(Exception, match="no plan fits"):
        solve(*ask(tight, load))
    plan = solve_with_best_chunk(*ask(tight, load))
    assert plan.workload.prefill_chunk_tokens < 256


def test_the_command_chooses_and_says_so(run_command: RunCommand) -> None:
    options = ("--device", "cpu=1GiB", "--device", "cpu=1GiB", "--use-all", "--execution", "process_per_stage")
    done = run_command(
        "llamaplan", "solve", SHIPPED, *options, "--prompt-tokens", "512", "--prefill-chunk", "auto", "--json"
    )
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    chunk = plan["workload"]["prefill_chunk_tokens"]
    shown = run_command("llamaplan", "solve", SHIPPED, *options, "--prompt-tokens", "512", "--prefill-chunk", chunk)
    assert (f"prefill in chunks of {chunk}" in shown.out) == (chunk < 512)
