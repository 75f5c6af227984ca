"""How many prompt tokens to prefill at a time, when the planner may choose.

Small chunks let the stages of a pipeline work at the same time, but read the weights once each and pay every message's
latency; one large chunk does the opposite, and needs the largest workspace. What is best depends on the cut, and the
cut on the workspace: so solve, choose for that cut, and solve again until the choice stays.
"""

from dataclasses import replace

from planner.answers.solve import objective_seconds, solve
from planner.problem.question import Question
from planner.program.effort import USUAL, Effort
from planner.timing.costs import CostModel, predict_chain
from plans.errors import InfeasibleError
from plans.plan import Plan

LEAST_CHUNK_TOKENS = 16
MOST_ROUNDS = 3


def candidate_chunks(prompt_tokens: int) -> tuple[int, ...]:
    """Return chunk sizes to try, the whole prompt first: equal parts in steps of about 1.4 down to 16 tokens."""
    sizes, parts = [prompt_tokens], 2.0
    while (size := -(-prompt_tokens // int(parts))) >= LEAST_CHUNK_TOKENS:
        sizes.append(size)
        parts = max(parts + 1, parts * 1.4)
    return tuple(dict.fromkeys(sizes))


def best_chunk(plan: Plan) -> int:
    """Return the chunk size with which the plan's own cut has its first token soonest; of equals the largest."""

    def first_token(chunk: int) -> float:
        load = plan.workload.model_copy(update={"prefill_chunk_tokens": chunk})
        model = CostModel(plan.profile, workload=load, cluster=plan.cluster, execution=plan.execution)
        return predict_chain(model, stages=plan.ranges)[1].time_to_first_token_seconds

    fitting = [c for c in candidate_chunks(plan.workload.prompt_tokens) if _has_room(plan, c)]
    return min(fitting, key=lambda chunk: (first_token(chunk), -chunk))


def _has_room(plan: Plan, chunk: int) -> bool:
    """Whether the workspace of a chunk fits every stage; smaller ones than the plan's always do."""
    if chunk <= plan.workload.prefill_chunk_tokens:
        return True
    from planner.answers.capacity import chain_of
    from planner.problem.evaluate import violations

    load = plan.workload.model_copy(update={"prefill_chunk_tokens": chunk})
    return not violations(replace(Question.of(plan), workload=load).problem(), chain_of(plan))


def solve_with_best_chunk(question: Question, effort: Effort = USUAL) -> Plan:
    """Solve, choosing the prefill chunk as well.

    Args:
        question: the chunk size of its workload does not matter.
        effort: for each chunk size that is tried.

    Returns:
        The best plan seen by its objective; of equally good ones that with the earliest first token.

    Raises:
        InfeasibleError: there is no plan even with the smallest chunks, or none was found in time.
    """
    sizes = candidate_chunks(question.workload.prompt_tokens)

    def with_chunk(size: int) -> Plan:
        load = question.workload.model_copy(update={"prefill_chunk_tokens": size})
        return solve(replace(question, workload=load), effort)

    try:
        seen = [with_chunk(sizes[0])]
    except InfeasibleError:
        if len(sizes) == 1:
            raise
        seen = [with_chunk(sizes[-1])]
    for _ in range(MOST_ROUNDS):
        chunk = best_chunk(seen[-1])
        if chunk in {plan.workload.prefill_chunk_tokens for plan in seen}:
            break
        seen.append(with_chunk(chunk))
    return min(seen, key=lambda plan: (objective_seconds(plan), plan.prediction.time_to_first_token_seconds))
