"""The re-check of a plan: structure by JSON pointer, memory in exact integers, and what is written to disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.check import check_plan, read_plan
from plans.cluster import Host
from plans.errors import InputError, IntegrityError, LlamaplanError
from plans.plan import Plan
from plans.workload import Workload
from tests.planner.cases import cluster, device, make_plan, tiny_profile, workload

PLAN = make_plan()
Change = Callable[[dict[str, Any]], Any]


def read_changed(change: Change, folder: Path) -> Plan:
    document = json.loads(PLAN.to_json())
    change(document)
    path = folder / "plan.json"
    path.write_text(json.dumps(document))
    return read_plan(path)


def stage(index: int, **changes: Any) -> Change:
    return lambda document: document["stages"][index].update(changes)


def test_a_good_plan_passes_and_reads_back_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json())
    again = read_plan(path)
    assert again == PLAN
    assert again.to_json() == PLAN.to_json()
    assert again.sha256 == PLAN.sha256
    assert again.boundaries == (3, 1)


def test_the_same_plan_is_written_with_the_same_bytes_twice() -> None:
    assert make_plan().to_json() == make_plan().to_json()


TAMPERED: dict[str, tuple[Change, type[LlamaplanError], str]] = {
    "overlap": (stage(1, start_layer=2), InputError, "/stages/1/start_layer: layers from 2 overlap"),
    "gap": (stage(1, start_layer=4), InputError, "/stages/1/start_layer: layers from 4 leave a gap"),
    "reversed": (
        stage(0, start_layer=3, end_layer=0),
        InputError,
        "/stages/0/end_layer: end_layer 0 comes before start_layer 3",
    ),
    "ends early": (stage(1, end_layer=3), InputError, "/stages/1/end_layer: the stages hold 3 layers"),
    "ends late": (stage(1, end_layer=99), InputError, "/stages/1/end_layer: the stages hold 99 layers"),
    "no embedding": (stage(0, has_embedding=False), InputError, "/stages/0/has_embedding"),
    "two embeddings": (stage(1, has_embedding=True), InputError, "/stages/1/has_embedding"),
    "no head": (stage(1, has_head=False), InputError, "/stages/1/has_head"),
    "two heads": (stage(0, has_head=True), InputError, "/stages/0/has_head"),
    "a stage twice": (lambda d: d["stages"].insert(0, d["stages"][0]), InputError, "/stages/1"),
    "an empty stage": (
        lambda d: d["stages"].insert(1, d["stages"][0] | {"start_layer": 3, "has_embedding": False}),
        InputError,
        "/stages/1: the stage is empty",
    ),
    "one device twice": (stage(1, device="a"), InputError, "/stages/1/device: a already holds another stage"),
    "an unknown device": (stage(1, device="c"), InputError, "/stages/1/device: c is not in the plan's cluster"),
    "no stages": (lambda d: d["stages"].clear(), InputError, "/stages"),
    "weights shrunk": (stage(0, weight_bytes=1), IntegrityError, "/stages/0/weight_bytes: the plan says 1"),
    "cache shrunk": (stage(1, kv_cache_bytes=0), IntegrityError, "/stages/1/kv_cache_bytes"),
    "workspace grown": (stage(1, activation_bytes=10**6), IntegrityError, "/stages/1/activation_bytes"),
    "overhead shrunk": (stage(0, overhead_bytes=9), IntegrityError, "/stages/0/overhead_bytes"),
    "budget grown": (stage(0, budget_bytes=2**40), IntegrityError, "/stages/0/budget_bytes"),
    "share changed": (lambda d: d["prediction"].update(max_memory_share=0.5), IntegrityError, "/max_memory_share"),
    "longer context": (lambda d: d["workload"].update(context_tokens=1024), IntegrityError, "/kv_cache_bytes"),
    "smaller device": (
        lambda d: d["cluster"]["devices"][0].update(budget_bytes=1),
        IntegrityError,
        "/stages/0/budget_bytes",
    ),
    "not a mixed plan": (lambda d: d.update(mixed_weight=0.5), InputError, "mixed_weight belongs to"),
    "demands of nothing": (lambda d: d.update(demands={}), InputError, "demands that fix nothing are left out"),
    "an unknown demand": (lambda d: d.update(demands={"luck": True}), InputError, "/demands/luck"),
    "a cut for another strategy": (
        lambda d: d.update(demands={"layers": "3,1"}, strategy="compute"),
        InputError,
        "demands.layers belongs to the strategy custom",
    ),
    "unit missing": (lambda d: d["profile"]["units"].pop(), InputError, "/profile"),
    "prompt beyond the context": (
        lambda d: d["workload"].update(prompt_tokens=500),
        InputError,
        "/workload: value error, prompt_tokens 500 + new_tokens 128 = 628 exceed context_tokens 512",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_plan_is_refused_at_its_pointer(
    change: Change, error: type[LlamaplanError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        read_changed(change, tmp_path)
    assert message in str(caught.value)


def test_a_plan_that_fits_to_the_byte_passes_and_one_byte_less_does_not() -> None:
    exact = PLAN.stages[0].total_bytes
    assert make_plan(cluster=cluster(device("a", budget_bytes=exact), device("b"))).stages[0].budget_bytes == exact
    check_plan(make_plan(cluster=cluster(device("a", budget_bytes=exact), device("b"))), where="x")
    short = make_plan(cluster=cluster(device("a", budget_bytes=exact - 1), device("b")))
    with pytest.raises(IntegrityError, match=f"needs {exact} bytes on a, whose budget is {exact - 1}"):
        check_plan(short, where="x")


def test_a_device_without_budget_does_not_pass() -> None:
    open_ended = PLAN.cluster.model_copy(
        update={"devices": tuple(d.model_copy(update={"budget_bytes": None}) for d in PLAN.cluster.devices)}
    )
    with pytest.raises(IntegrityError, match="offers None"):
        check_plan(PLAN.model_copy(update={"cluster": open_ended}), where="x")


@pytest.mark.parametrize("execution", ["one_process", "process_per_stage"])
def test_the_overhead_of_processes_is_checked_as_the_plan_says_they_run(execution: str) -> None:
    host = Host(name="local", process_overhead_bytes=1000)
    parts = cluster(device("a"), device("b"), hosts=(host,))
    plan = make_plan(cluster=parts, execution=execution)
    check_plan(plan, where="x")
    assert [s.overhead_bytes for s in plan.stages] == [1000, 1000 if execution == "process_per_stage" else 0]


NUMBERS = [
    ("stages", index, key)
    for index in (0, 1)
    for key in (
        "start_layer",
        "end_layer",
        "weight_bytes",
        "kv_cache_bytes",
        "activation_bytes",
        "overhead_bytes",
        "budget_bytes",
    )
]


@given(path=st.sampled_from(NUMBERS), value=st.integers(0, 2**40))
def test_no_changed_number_of_a_stage_passes(path: tuple[str, int, str], value: int) -> None:
    key, index, field = path
    document = json.loads(PLAN.to_json())
    if document[key][index][field] == value:
        return
    document[key][index][field] = value
    changed = Plan.from_json(json.dumps(document).encode(), where="x")
    with pytest.raises(LlamaplanError) as caught:
        check_plan(changed, where="x")
    assert f"/stages/{index}" in str(caught.value) or "/stages/1" in str(caught.value)


@given(st.data())
def test_no_wrong_type_anywhere_passes(data: st.DataObject) -> None:
    document = json.loads(PLAN.to_json())
    node: Any = document
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list):
            break
        node = node[key]
    node[key] = data.draw(st.sampled_from([[], {"a": 1}, [1.5]]))
    with pytest.raises(LlamaplanError):
        check_plan(Plan.from_json(json.dumps(document).encode(), where="x"), where="x")


# --- workload -----------------------------------------------------------------------------------------------------


@given(prompt=st.integers(1, 300), chunk=st.integers(1, 300))
def test_chunks_cover_the_prompt_in_order(prompt: int, chunk: int) -> None:
    load = workload(prompt_tokens=prompt, prefill_chunk_tokens=chunk)
    chunks = load.prefill_chunks
    assert sum(tokens for tokens, _past in chunks) == prompt
    assert [past for _tokens, past in chunks] == [sum(t for t, _ in chunks[:i]) for i in range(len(chunks))]
    assert all(1 <= tokens <= chunk for tokens, _past in chunks)


def test_a_workload_reads_back_byte_for_byte() -> None:
    text = workload(batch_size=4).to_json()
    assert Workload.from_json(text.encode(), where="x").to_json() == text


def test_a_profile_of_another_number_of_layers_is_no_chain() -> None:
    document = json.loads(tiny_profile().to_json())
    document["model"]["num_hidden_layers"] = 5
    with pytest.raises(InputError, match="layers 0 to 4"):
        type(tiny_profile()).from_json(json.dumps(document).encode(), where="profile.json")
