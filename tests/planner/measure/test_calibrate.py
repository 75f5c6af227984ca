"""Calibration by a run: the corrected cluster predicts the run, and bad or foreign runs are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from planner.measure.calibrate import calibrate
from planner.model.profile import build_profile
from planner.timing.costs import CostModel, predict_chain
from plans.checkpoint.folder import open_checkpoint
from plans.cluster import Timings
from plans.errors import InputError
from plans.plan import Plan
from plans.run import Bench, read_run
from tests.conftest import RunCommand
from tests.planner.cases import cluster, device, in_width

DEVICES = ("--device", "cpu=800MiB", "--device", "cpu=800MiB")


def document(profile: Any, **changes: Any) -> dict[str, Any]:
    """A bench of two stages that took 10 and 30 ms per token, and 5 ms beside them."""
    stage = {"device": "cpu", "decode_steps": 10, "decode_read_bytes": 1, "decode_hop_seconds": 0.0, "path": "fast"}
    layers = profile.model.num_hidden_layers
    return {
        "schema_version": 1,
        "kind": "bench",
        "plan_sha256": None,
        "export_id": None,
        "load_seconds": 0.5,
        "peak_memory_bytes": 1 << 28,
        "config_sha256": profile.model.config_sha256,
        "dtype": "bfloat16",
        "prompt_tokens": 64,
        "new_tokens": 32,
        "batch_size": 1,
        "prefill_chunk_tokens": 2048,
        "repeats": 3,
        "time_to_first_token_seconds": 3.0,
        "prefill_tokens_per_second": 64 / 3,
        "tokens_per_second": 1 / 0.045,
        "decode_read_bytes": 2,
        "decode_read_bytes_per_second": 2 / 0.045,
        "read_bandwidth_bytes_per_second": {"cpu": 1e9},
        "in_flight": 1,
        "pipelined_tokens_per_second": None,
        "prediction": None,
        "median_seconds_per_token": 0.045,
        "stages": [
            stage | {"planned_device": "cpu#0", "start_layer": 0, "end_layer": 3, "has_embedding": True,
                     "has_head": False, "decode_compute_seconds": 0.1, "prefill_compute_seconds": 1.0},
            stage | {"planned_device": "cpu#1", "start_layer": 3, "end_layer": layers, "has_embedding": False,
                     "has_head": True, "decode_compute_seconds": 0.3, "prefill_compute_seconds": 2.0},
        ],
    } | changes  # fmt: skip


@pytest.mark.parametrize("weights", [None, "int4"])
@pytest.mark.parametrize("has_curves", [False, True])
def test_the_corrected_cluster_predicts_the_run_itself(shipped: Path, has_curves: bool, weights: Any) -> None:
    checkpoint = open_checkpoint(shipped)
    profile = build_profile(checkpoint) if weights is None else in_width(weights, checkpoint).profile
    curves = Timings(
        profile=profile.layers[0].shapes_sha256,
        dtype="bf16",
        decode_seconds_per_layer=((16, 1, 0.001), (512, 1, 0.002)),
        prefill_seconds_per_layer=((16, 0, 1, 0.01), (512, 0, 1, 0.3)),
        embedding_seconds=((1, 0.0001), (64, 0.0002)),
        head_seconds=((1, 0.001),),
    )
    known = (curves,) if has_curves else ()
    parts = cluster(device("cpu#0", timings=known), device("cpu#1", timings=known))
    run = Bench.model_validate_json(json.dumps(document(profile)))
    found = calibrate(parts, profile, run, where="run.json")
    assert [drift.measured_decode_seconds for drift in found.stages] == [pytest.approx(0.015), pytest.approx(0.03)]
    model = CostModel(profile, workload=found.workload, cluster=found.cluster)
    stages, prediction = predict_chain(model, stages=[drift.stage for drift in found.stages])
    assert [s.decode_seconds for s in stages] == [pytest.approx(0.015), pytest.approx(0.03)]
    assert [s.prefill_seconds for s in stages] == [pytest.approx(1.0), pytest.approx(2.0)]
    assert prediction.seconds_per_token == pytest.approx(0.045, rel=1e-3)


def test_a_device_that_took_no_part_keeps_its_times(shipped: Path) -> None:
    profile = build_profile(open_checkpoint(shipped))
    parts = cluster(device("cpu#0"), device("cpu#1"), device("cuda:0", kind="cuda"))
    run = Bench.model_validate_json(json.dumps(document(profile)))
    assert calibrate(parts, profile, run, where="run.json").cluster.device("cuda:0") == parts.device("cuda:0")


def test_a_real_run_of_the_shipped_checkpoint_calibrates_the_plan(
    run_command: RunCommand, shipped: Path, tmp_path: Path
) -> None:
    plan, run, again = (tmp_path / name for name in ("plan.json", "run.json", "again.json"))
    cut = ("--layers", "3,4", "-c", 64, "--prompt-tokens", 16, "-n", 8)
    assert run_command("llamaplan", "solve", shipped, *DEVICES, *cut, "-o", plan).code == 0
    sizes = ("--prompt-tokens", 16, "-n", 8, "--repeats", 1, "--threads", 1)
    ran = run_command("llamarun", "bench", plan, "--model", shipped, *sizes, "--json")
    assert ran.code == 0, ran.err
    run.write_text(ran.out)
    sizes = ("-c", 64, "--prompt-tokens", 16, "-n", 8)
    done = run_command("llamaplan", "solve", shipped, *DEVICES, *sizes, "--calibrate", run, "--json", "-o", again)
    assert done.code == 0, done.err
    found, measured = json.loads(done.out)["calibration"], json.loads(ran.out)["median_seconds_per_token"]
    assert [stage["device"] for stage in found["stages"]] == ["cpu#0", "cpu#1"]
    assert found["new_cut_seconds"] <= found["run_cut_seconds"]
    stages = sum(stage["measured_decode_seconds"] for stage in found["stages"])
    hops = sum(stage["decode_hop_seconds"] / stage["decode_steps"] for stage in json.loads(ran.out)["stages"])
    assert stages + hops >= measured * 0.999  # what a step took beside its stages is charged to the first
    assert found["run_cut_seconds"] == pytest.approx(stages, rel=0.05)  # and the hops that are assumed
    assert Plan.read(again).prediction.seconds_per_token == found["new_cut_seconds"]
    assert run_command("llamaplan", "check", again).code == 0


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"config_sha256": "0" * 64}, 5, "another model"),
        ({"dtype": "float32"}, 5, "another dtype"),
        ({"kind": "story"}, 3, "is no run"),
        ({"new_tokens": 0}, 3, "/new_tokens"),
        ({"schema_version": 2}, 3, "/schema_version"),
        ({"median_seconds_per_token": "fast"}, 3, "/median_seconds_per_token"),
        ({"stages": []}, 3, "/stages"),
    ],
)
def test_foreign_and_broken_runs_are_refused(
    run_command: RunCommand, shipped: Path, tmp_path: Path, changes: dict[str, Any], code: int, says: str
) -> None:
    profile = build_profile(open_checkpoint(shipped))
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document(profile, **changes)))
    done = run_command("llamaplan", "solve", shipped, *DEVICES, "--calibrate", path)
    assert (done.code, says in done.err) == (code, True), done.err


def test_a_run_on_other_devices_or_with_a_gap_is_refused(
    run_command: RunCommand, shipped: Path, tmp_path: Path
) -> None:
    profile = build_profile(open_checkpoint(shipped))
    path = tmp_path / "run.json"
    cases = [
        (0, {"planned_device": "cpu#7"}, 5, "another cluster"),
        (0, {"device": "cuda:0"}, 5, "another placement"),
        (1, {"start_layer": 4}, 3, "stage 1: layers from 4 leave a gap"),
        (1, {"end_layer": 5}, 5, "5 layers"),
    ]
    for index, change, code, says in cases:
        broken = document(profile)
        broken["stages"][index] |= change
        path.write_text(json.dumps(broken))
        done = run_command("llamaplan", "solve", shipped, *DEVICES, "--calibrate", path)
        assert (done.code, says in done.err) == (code, True), done.err


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"median_seconds_per_token": None}, "/median_seconds_per_token"),
        ({"stages": {"decode_steps": 0}}, "/stages/0/decode_steps"),
        ({"stages": {"decode_compute_seconds": 0.0}}, "/stages/0/decode_compute_seconds"),
    ],
)
def test_a_run_that_decoded_nothing_teaches_nothing(
    shipped: Path, tmp_path: Path, changes: dict[str, Any], pointer: str
) -> None:
    broken = document(build_profile(open_checkpoint(shipped)))
    broken["stages"][0] |= changes.pop("stages", {})
    path = tmp_path / "run.json"
    path.write_text(json.dumps(broken | changes))
    with pytest.raises(InputError, match=f"{pointer}: nothing was decoded"):
        read_run(path)


def test_keys_of_other_versions_are_left_alone(shipped: Path, tmp_path: Path) -> None:
    profile = build_profile(open_checkpoint(shipped))
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document(profile, weather="fine")))
    assert read_run(path).as_json() == document(profile)


def test_what_is_no_json_at_all_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_run(path)
