"""Measured curves: what is timed, where it is kept, and that a plan follows it."""

import json
import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from planner.devices.clusters import for_speed
from planner.devices.machine import inspect_machine
from planner.measure.cluster import devices_here, read_rates, replace_timings, with_measured_rates
from planner.measure.points import choose_points, default_checkpoint, last_cache_bytes
from planner.model.profile import build_profile
from planner.report.origins import decode_origin
from planner.timing.costs import CostModel
from planner.timing.roofline import Work, roofline_seconds
from planner.timing.unit_times import estimate
from plans.checkpoint.folder import open_checkpoint
from plans.cluster import Cluster, Device, Timings
from plans.errors import MachineError, UsageError
from tests.conftest import RunCommand
from tests.planner.cases import bare, cluster, device, solve, tiny_profile, workload

PROFILE = tiny_profile(num_hidden_layers=12)
LAYER = PROFILE.layers[0]


def curves(seconds: float, *, path: str = "fast", profile: str = LAYER.shapes_sha256) -> Timings:
    return Timings(
        profile=profile,
        dtype="bf16",
        path=path,
        decode_seconds_per_layer=((16, 1, seconds), (1024, 1, 2 * seconds)),
        prefill_seconds_per_layer=((16, 0, 1, 4 * seconds), (1024, 0, 1, 64 * seconds)),
        embedding_seconds=((1, seconds),),
        head_seconds=((1, seconds),),
    )


def timed(name: str, seconds: float, **changes: object) -> Device:
    return device(name, timings=(curves(seconds),), **changes)


# --- a plan follows the curves ------------------------------------------------------------------------------------


def test_a_device_twice_as_slow_gets_half_the_layers_when_stages_take_turns() -> None:
    quick, slow = timed("cpu#0", 0.01), timed("cpu#1", 0.02)
    plan = solve(
        PROFILE,
        cluster=cluster(quick, slow),
        workload=workload(requests_in_flight=4),
        objective="throughput",
        is_isolated=False,
    )
    layers = {stage.device: stage.num_layers for stage in plan.ranges}
    assert (layers["cpu#0"], layers["cpu#1"]) == (8, 4)


def test_the_curves_of_the_path_that_runs_count() -> None:
    both = cluster(device("cpu", timings=(curves(0.01, path="reference"), curves(0.004, path="fast"))))
    seconds = {
        speed: CostModel(PROFILE, workload=workload(), cluster=for_speed(both, speed)).decode_seconds(LAYER, "cpu")
        for speed in ("auto", "reference")
    }
    at = pytest.approx(1 + (192 - 16) / (1024 - 16))
    assert (seconds["auto"] / 0.004, seconds["reference"] / 0.01) == (at, at)


def test_a_measured_stage_says_so() -> None:
    plan = solve(PROFILE, cluster=cluster(timed("cpu", 0.01)), workload=workload(), is_isolated=False)
    model = CostModel(PROFILE, workload=plan.workload, cluster=plan.cluster)
    assert decode_origin(plan.stages[0], model) == "measured"


def test_measuring_again_replaces_curves_of_the_same_shape_and_keeps_others() -> None:
    other = curves(1.0, profile="0" * 64)
    known = replace_timings((), [curves(1.0, path="reference"), curves(1.0), other])
    again = replace_timings(known, [curves(2.0)])
    assert again == (other, curves(2.0))


def test_rates_from_curves_give_the_curves_back_by_the_roofline() -> None:
    measured = with_measured_rates(device("cpu", unit_overhead_seconds=1.0), curves(0.01), profile=PROFILE)
    seconds = roofline_seconds(LAYER, measured, work=Work(1024, 0, 1), profile=PROFILE)
    assert seconds == pytest.approx(0.64)


# --- what is timed ------------------------------------------------------------------------------------------------


def test_layers_that_fit_a_cache_are_timed_in_greater_numbers() -> None:
    small = build_profile(bare(num_hidden_layers=100))
    points = choose_points(small, device("cpu"), free_bytes=1 << 40, cache_bytes=10 * LAYER.weight_bytes)
    assert points.num_layers == 40
    whole = choose_points(small, device("cpu"), free_bytes=1 << 40, cache_bytes=last_cache_bytes())
    assert whole.num_layers == 100


def test_memory_bounds_the_layers_and_less_than_one_is_refused_with_both_numbers() -> None:
    huge = build_profile(
        bare(hidden_size=16384, intermediate_size=53248, num_attention_heads=128, num_key_value_heads=8, head_dim=128,
             num_hidden_layers=126, vocab_size=128256)
    )  # fmt: skip
    most = choose_points(huge, device("cpu"), free_bytes=1 << 40, cache_bytes=1 << 36)
    one = choose_points(huge, device("cpu"), free_bytes=most.needed_bytes - 1, cache_bytes=1 << 36)
    assert one.num_layers == most.num_layers - 1
    with pytest.raises(MachineError, match=r"need .* \(\d+ bytes\), 4.00 GiB \(4294967296 bytes\) are free"):
        choose_points(huge, device("cpu"), free_bytes=1 << 32, cache_bytes=0)


def test_points_stay_within_the_model_and_leave_out_what_takes_too_long() -> None:
    short = build_profile(bare(max_position_embeddings=100))
    points = choose_points(short, device("cpu"), free_bytes=1 << 40, cache_bytes=0)
    assert max(context for context, _batch in points.decode) <= 100
    assert max(tokens + past for tokens, past, _batch in points.prefill) <= 100
    slow = device("cpu", flops_per_second={"bf16": 1e3})
    assert choose_points(short, slow, free_bytes=1 << 40, cache_bytes=0).prefill == ((16, 0, 1),)


def test_the_built_in_shape_has_1_1_billion_parameters() -> None:
    assert build_profile(default_checkpoint()).total_parameters == pytest.approx(1.1e9, rel=0.01)


def test_which_devices_are_here_must_be_clear() -> None:
    here = inspect_machine()
    pair = cluster(device("a/cpu", host="a"), device("b/cpu", host="b"))
    with pytest.raises(UsageError, match="--host: a, b"):
        devices_here(pair, here, host=None)
    with pytest.raises(UsageError, match="one of a, b"):
        devices_here(pair, here, host="c")
    assert [found.name for found in devices_here(pair, here, host="b")] == ["b/cpu"]
    with pytest.raises(UsageError, match="no device of the cluster is on this machine"):
        devices_here(cluster(device("npu:0")), here, host=None)


# --- the command --------------------------------------------------------------------------------------------------


def test_measure_times_real_layers_and_a_plan_rests_on_them(
    run_command: RunCommand, shipped: Path, tmp_path: Path
) -> None:
    """What is not measured stays as it was, and the plan can be recomputed from what it carries."""
    model = with_short_context(shipped, tmp_path / "model")
    path, plan = tmp_path / "cluster.json", tmp_path / "plan.json"
    before = run_command("llamaplan", "devices", "--device", "cpu=1GiB", "--device", "cpu=1GiB", "-o", path)
    assert before.code == 0
    done = run_command("llamaplan", "devices", model, "--measure", "--cluster", path, "--threads", "1", "-o", path)
    assert done.code == 0, done.err
    measured = Cluster.read(path)
    profile = build_profile(open_checkpoint(model))
    first, second = measured.devices
    assert first.timings == second.timings
    assert {t.path for t in first.timings} >= {"reference"}
    for timings in first.timings:
        assert (timings.profile, timings.dtype, timings.threads) == (profile.layers[0].shapes_sha256, "bf16", 1)
        assert {batch for _context, batch, _seconds in timings.decode_seconds_per_layer} == {1, 2, 4, 8}
        assert estimate(timings.decode_seconds_per_layer, point=(32, 1), model=lambda _p: 1.0).seconds > 0
    assert measured.hosts[0].process_overhead_bytes > 100 << 20
    together = measured.hosts[0].memory_bandwidth_bytes_per_second
    assert together is not None
    assert together < 1e14
    assert together >= max(rate for t in first.timings for rate in read_rates(t, profile))
    assert f"cpu#0, cpu#1 read {together / 1e9:.1f} GB/s together" in done.out
    assert (first.budget_bytes, first.memory_bandwidth_bytes_per_second) == (1 << 30, 9e9 * inspect_machine().cpu_cores)
    solved = run_command("llamaplan", "solve", model, "--cluster", path, "-o", plan)
    assert solved.code == 0, solved.err
    assert run_command("llamaplan", "check", plan, "--model", model).code == 0


def with_short_context(model: Path, target: Path) -> Path:
    """A copy that is measured in seconds, as it has no long contexts."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    return target


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--threads", "2"], 2, "belong to --measure"),
        (["MODEL", "--catalogue"], 2, "takes no model"),
        (["missing", "--measure"], 3, "no such file"),
        (["MODEL", "--measure", "--dtype", "int3"], 2, "int3"),
        (["MODEL", "--measure", "--host", "elsewhere"], 2, "no devices in the cluster"),
        (["MODEL", "--measure", "--device", "rtx4090"], 2, "no device of the cluster is on this machine"),
    ],
)
def test_bad_requests_are_refused(
    run_command: RunCommand, shipped: Path, arguments: list[str], code: int, says: str
) -> None:
    done = run_command("llamaplan", "devices", *(str(shipped) if a == "MODEL" else a for a in arguments))
    assert (done.code, says in done.err) == (code, True), done.err


def test_a_bare_configuration_is_measured_with_random_weights(
    run_command: RunCommand, shipped: Path, tmp_path: Path
) -> None:
    config = json.loads((shipped / "config.json").read_text()) | {"num_hidden_layers": 1, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run_command("llamaplan", "devices", tmp_path / "config.json", "--measure", "--dtype", "fp32", "--json")
    assert done.code == 0, done.err
    timings = json.loads(done.out)["devices"][-1]["timings"]
    assert {entry["dtype"] for entry in timings} == {"fp32"}


@pytest.mark.parametrize("is_calm", [True, False])
def test_two_bad_moments_of_three_spoil_no_point(
    is_calm: bool, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from planner.measure import layers

    config = json.loads((shipped / "config.json").read_text()) | {"num_hidden_layers": 1, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path / "config.json")
    profile, rounds, visits = build_profile(checkpoint), iter((9.0, 5.0, 1.0)), layers._visits
    points = choose_points(profile, device("cpu"), free_bytes=1 << 40, cache_bytes=0)
    seconds = [0.0]

    def next_round(*arguments: Any) -> Any:
        seconds[0] = next(rounds)
        return visits(*arguments)

    monkeypatch.setattr(layers, "_visits", next_round)
    monkeypatch.setattr(layers, "_layer_seconds", lambda *_: seconds[0])
    # the first, bad round seems the only calm one, or all do
    monkeypatch.setattr(layers.CalmMeter, "other_cores", lambda _: 0.0 if is_calm or seconds[0] == 9.0 else 1.0)
    found = layers.measure_device(checkpoint, profile, device="cpu", points=points)
    assert found is not None
    assert {row[-1] for row in found.timings[0].decode_seconds_per_layer} == {1.0}
    assert {row[-1] for row in found.timings[0].prefill_seconds_per_layer} == {1.0}
    assert not found.is_disturbed


@pytest.mark.parametrize(("seconds", "prompts"), [(0.01, 3), (0.06, 2), (1.0, 1)])
def test_a_visit_is_the_median_of_the_prompts_that_fit_its_time(
    seconds: float, prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from planner.measure import layers

    clock, readings = count(0.0, seconds), iter((2.0, 3.0, 1.0))
    monkeypatch.setattr(layers, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(layers, "_read_prompt", lambda *_: (0.0, ()))
    monkeypatch.setattr(layers, "_layer_seconds", lambda *_: next(readings))
    monkeypatch.setattr(layers, "_rest", lambda *_: 0.0)
    found = layers.Samples()
    layers._visit_prefill(cast("Any", None), (16, 0, 1), layers.Samples(), found)
    assert (found.prefill, len(list(readings))) == ({(16, 0, 1): [2.0]}, 3 - prompts)
