"""The planner from Python, in two calls: what a model costs, and how to cut it."""

from collections.abc import Sequence
from pathlib import Path

from planner.answers.solve import solve
from planner.devices.clusters import load_cluster
from planner.model.find import find_model
from planner.model.packed import Width
from planner.model.profile import build_profile
from planner.model.widths import as_asked
from planner.model.workloads import make_workload
from planner.problem.question import Question
from plans.checkpoint.folder import open_checkpoint
from plans.cluster import Cluster
from plans.dtypes import DtypeName
from plans.plan import NO_DEMANDS, Demands, Objective, Plan, Strategy
from plans.profile import ModelProfile


def analyze_model(
    model: str | Path, *, dtype: DtypeName | None = None, kv_cache_dtype: DtypeName | None = None
) -> ModelProfile:
    """Return what every unit of a model costs; no weight is read.

    Args:
        model: checkpoint folder, `.gguf` file, bare `config.json`, or `org/name` in the local Hugging Face cache.
        dtype: count weights at this dtype; None keeps the stored one.
        kv_cache_dtype: dtype of the KV cache; None takes `dtype`.

    Raises:
        InputError, IntegrityError, MachineError: as `plans.checkpoint.folder.open_checkpoint`.

    Example:
        >>> analyze_model("my-model").total_parameters  # doctest: +SKIP
        1100048384
    """
    return build_profile(open_checkpoint(find_model(str(model))), dtype=dtype, kv_cache_dtype=kv_cache_dtype)


def solve_model(
    model: str | Path,
    *,
    cluster: Cluster | None = None,
    devices: Sequence[str] | None = None,
    strategy: Strategy = "compute",
    objective: Objective = "latency",
    layers: Sequence[int] | None = None,
    weights: Width | None = None,
    ctx_size: int | None = None,
    batch_size: int = 1,
) -> Plan:
    """Return the best plan for a model; a `planner.problem.question.Question` holds all there is to ask.

    Args:
        model: as `analyze_model`.
        cluster: devices with budgets; None takes `devices`, or else this machine.
        devices: as the command's `--device`, such as ``["cuda:0=20GiB", "cpu=32GiB"]``.
        strategy: what is minimised.
        objective: which time is meant.
        layers: layers per device in their order, for the strategy `custom` (then implied).
        weights: what the layers' matrices are packed to when the plan is exported; None for not at all. A head with a
            table of its own gets 8 bits.
        ctx_size: context tokens the KV cache is sized for.
        batch_size: sequences per batch.

    Raises:
        UsageError: weights that cannot be packed.
        InfeasibleError: nothing fits; the message says what is short and what would help.

    Example:
        >>> solve_model("my-model", devices=["cuda:0=20GiB", "cpu=32GiB"]).boundaries  # doctest: +SKIP
        (28, 4)
    """
    checkpoint = open_checkpoint(find_model(str(model)))
    profile = build_profile(checkpoint)
    found = as_asked(checkpoint, profile, weights=weights)
    question = Question(
        profile,
        cluster=cluster or load_cluster(devices=devices),
        workload=make_workload(profile, ctx_size=ctx_size, batch_size=batch_size),
        strategy=strategy if layers is None else "custom",
        objective=objective,
        demands=NO_DEMANDS if layers is None else Demands(layers=",".join(map(str, layers))),
    )
    return solve(question if found is None else question.packed(found))
