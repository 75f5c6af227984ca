"""The same cut of a model whose weights are stored otherwise: costed and checked anew, nothing is searched."""

from planner.answers.solve import solve
from planner.problem.question import Question
from plans.plan import Demands, Plan
from plans.profile import ModelProfile


def recut(plan: Plan, profile: ModelProfile) -> Plan:
    """Return a plan with the stages of `plan` for `profile`, a model of the same layers.

    Args:
        plan: whose cut, devices and workload are kept. A KV cache in the dtype of the weights stays in theirs.
        profile: what the weights have become.

    Raises:
        InfeasibleError: a stage does not fit any more; says what is short.
    """
    workload, dtype = plan.workload, profile.dtype
    kept = dtype if workload.kv_cache_dtype == workload.dtype else workload.kv_cache_dtype
    cut = ",".join(f"{stage.start_layer}-{stage.end_layer}@{stage.device}" for stage in plan.stages)
    question = Question(
        profile,
        plan.cluster,
        workload.model_copy(update={"dtype": dtype, "kv_cache_dtype": kept}),
        strategy="custom",
        objective=plan.objective,
        execution=plan.execution,
        demands=Demands(layers=cut),
    )
    return solve(question)
