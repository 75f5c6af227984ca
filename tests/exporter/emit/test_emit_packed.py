"""Plans with packed weights in the words of other engines: what each is known to do with them."""

from typing import Any

import pytest

from exporter.emit import emit
from plans.errors import UsageError
from plans.packed.choice import WeightChoice
from plans.plan import Plan
from tests.planner.cases import EVEN, bare, cluster, device, in_width, make_plan

CPUS = cluster(device("cpu#0"), device("cpu#1"))
GPUS = cluster(device("cuda:0", kind="cuda"), device("cuda:1", kind="cuda"))


def packed_plan(width: str, parts: Any = GPUS, *, head: str | None = "bf16") -> Plan:
    found = in_width(width, head=head)
    return make_plan(profile=found.profile, weights=found.choice, cluster=parts)


@pytest.mark.parametrize(
    ("engine", "plan", "reason", "way_out"),
    [
        ("vllm", packed_plan("int8", CPUS), "no kernels for 8-bit weights", "--weights int4"),
        ("vllm", packed_plan("int4", CPUS, head="int8"), "a head in int8", "--head-weights bf16"),
        ("vllm", packed_plan("int8", CPUS, head="int8"), "no kernels for 8-bit", "--weights int4 --head-weights bf16"),
        ("sglang", packed_plan("int4", head="int8"), "a head in int8 wrongly", "--head-weights bf16"),
        ("tensorrt-llm", packed_plan("int4"), "Model Optimizer", "without --weights"),
        ("llama.cpp", packed_plan("int4"), "its converter unpacks", "Q4_0"),
    ],
)
def test_an_engine_that_cannot_take_packed_weights_refuses_with_a_way_out(
    engine: str, plan: Plan, reason: str, way_out: str
) -> None:
    with pytest.raises(UsageError) as refused:
        emit(plan, engine=engine)
    assert reason in refused.value.what
    assert way_out in refused.value.hint


@pytest.mark.parametrize(
    ("engine", "plan"),
    [
        ("vllm", packed_plan("int4", CPUS)),
        ("vllm", packed_plan("int8", head="int8")),
        ("sglang", packed_plan("int8")),
        ("torchrun", packed_plan("int4", CPUS, head="int8")),
    ],
)
def test_engines_with_kernels_for_them_lose_nothing_by_it(engine: str, plan: Plan) -> None:
    said = " ".join(emit(plan, engine=engine).not_expressed)
    assert "pack" not in said
    assert "int" not in said.replace("into", "")


def test_transformers_unpacks_the_weights_and_says_what_every_stage_then_takes() -> None:
    plan = packed_plan("int4")
    (said,) = emit(plan, engine="transformers").not_expressed
    layer = in_width("int4").profile.layers[0]
    grown = plan.stages[0].total_bytes + 3 * (2 * layer.parameters - layer.weight_bytes)
    assert f"stage 0 then takes {grown / 1024:.1f} KiB" in said
    assert "budget" not in said
    tight = cluster(*(d.model_copy(update={"budget_bytes": plan.stages[0].total_bytes}) for d in GPUS.devices))
    (said,) = emit(packed_plan("int4", tight), engine="accelerate").not_expressed
    assert "its budget is" in said


def test_mixed_layers_with_one_of_eight_bits_are_no_plan_for_vllm_on_cpus() -> None:
    from planner.model.profile import build_profile
    from planner.model.widths import packed

    choice = WeightChoice(kind="mixed", layer_bits=(4, 4, 4, 8))
    profile = packed(bare(**EVEN), build_profile(bare(**EVEN)), choice).profile
    with pytest.raises(UsageError, match="8-bit weights"):
        emit(make_plan(profile=profile, weights=choice, cluster=CPUS), engine="vllm")
