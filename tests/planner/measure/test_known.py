"""What is known of this machine: the look, the remembered measurement, and who is never looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from planner.devices.clusters import load_cluster
from planner.measure import known
from planner.measure.cluster import MeasuredCluster
from planner.measure.processor.look import Look, look_in_a_process
from planner.model.profile import build_profile
from plans.checkpoint.folder import open_checkpoint
from plans.cluster import Cluster, Timings
from plans.profile import ModelProfile, PackedName
from tests.conftest import RunCommand

LOOK = Look(
    threads=2,
    read_bytes_per_second=30e9,
    flops_per_second={"fp32": 100e9, "bf16": 20e9, "fp16": 25e9},
    has_compiler=True,
)
DAY = "2026-11-29"


class Looks:
    """Stands for the process that looks, and counts how often it is started."""

    def __init__(self) -> None:
        self.count = 0
        self.answer: Look | None = LOOK

    def __call__(self) -> Look | None:
        self.count += 1
        return self.answer


@pytest.fixture(autouse=True)
def looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Looks:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LLAMAPLAN_PROBE", "1")
    monkeypatch.setattr(known, "_today", lambda: DAY)
    fake = Looks()
    monkeypatch.setattr(known, "look_in_a_process", fake)
    return fake


@pytest.fixture
def profile(shipped: Path) -> ModelProfile:
    return build_profile(open_checkpoint(shipped), dtype="fp32")


def rates(cluster: Cluster, device: str = "cpu") -> tuple[float, float, float]:
    found = cluster.device(device)
    return found.memory_bandwidth_bytes_per_second, found.flops_per_second["bf16"], found.unit_overhead_seconds


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "llamaplan").glob("*.json"))


def test_the_machine_is_looked_at_once_and_the_day_is_said(looks: Looks) -> None:
    first, second = (known.with_known(load_cluster()) for _ in range(2))
    assert looks.count == 1
    assert rates(first.cluster) == rates(second.cluster) == (0.93 * 30e9, 0.9 * 100e9, 30e-6)
    assert first.origins == second.origins
    assert f"seen here on {DAY} with 2 threads: reads 30.0 GB/s" in first.origins[0]


def test_transformers_own_layers_reach_less_of_the_machine() -> None:
    found = known.with_known(load_cluster(), speed="reference")
    assert rates(found.cluster) == (0.5 * 30e9, 0.9 * 20e9, 400e-6)


def test_without_a_compiler_no_native_kernels_are_planned_for(looks: Looks) -> None:
    looks.answer = LOOK.model_copy(update={"has_compiler": False})
    assert rates(known.with_known(load_cluster()).cluster)[1] == 0.9 * 20e9


@pytest.mark.parametrize("change", ["damage", "machine", "permissions"])
def test_a_look_that_is_damaged_or_of_another_machine_is_made_again(change: str, looks: Looks, tmp_path: Path) -> None:
    known.with_known(load_cluster())
    (path,) = files(tmp_path)
    if change == "damage":
        path.write_text(path.read_text()[:-10])
    elif change == "machine":
        path.write_text(path.read_text().replace(known.fingerprint().processor, "another"))
    else:
        path.chmod(0o666)
    assert rates(known.with_known(load_cluster()).cluster)[0] == 0.93 * 30e9
    assert looks.count == 2


def test_another_number_of_threads_is_another_machine(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        known.with_known(load_cluster())
    assert looks.count == 2


def test_a_look_in_a_busy_moment_is_used_with_a_warning_and_not_kept(looks: Looks, tmp_path: Path) -> None:
    looks.answer = LOOK.model_copy(update={"is_disturbed": True})
    found = known.with_known(load_cluster())
    assert found.warnings == (known.DISTURBED,)
    assert files(tmp_path) == []


def test_a_machine_that_cannot_be_looked_at_keeps_its_estimates(looks: Looks) -> None:
    looks.answer = None
    offered = load_cluster()
    found = known.with_known(offered)
    assert found.cluster == offered
    assert "estimates" in found.warnings[0]


def test_the_real_look_finds_rates_of_every_dtype() -> None:
    found = look_in_a_process()
    assert found is not None
    assert set(found.flops_per_second) == {"fp32", "bf16", "fp16"}


def test_described_devices_are_never_looked_at(looks: Looks, shipped: Path, run_command: RunCommand) -> None:
    described = Path(__file__).parents[3] / "plans" / "examples" / "lab.json"
    for options in (["--device", "rtx4090", "--device", "ddr4-2ch=4GiB"], ["--cluster", described]):
        for switch in ([], ["--no-probe"]):
            done = run_command("llamaplan", "solve", shipped, *options, *switch, "--json")
            assert done.code == 0
            assert "origins" not in json.loads(done.out)
            assert run_command("llamaplan", "devices", *options, *switch).code == 0
    assert looks.count == 0


def test_no_probe_plans_as_before(
    looks: Looks, shipped: Path, run_command: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [tmp_path / name for name in ("with.json", "without.json", "off.json")]
    for plan, switch in zip(plans, (["--probe"], ["--no-probe"], []), strict=True):
        monkeypatch.setenv("LLAMAPLAN_PROBE", "1" if switch else "0")
        assert run_command("llamaplan", "solve", shipped, "--device", "cpu=1GiB", *switch, "-o", plan).code == 0
    assert looks.count == 1
    assert plans[1].read_bytes() == plans[2].read_bytes() != plans[0].read_bytes()


def test_devices_and_solve_say_where_the_rates_are_from(shipped: Path, run_command: RunCommand) -> None:
    shown = run_command("llamaplan", "devices")
    assert f"seen here on {DAY}" in shown.out
    assert "estimates" not in shown.out
    solved = run_command("llamaplan", "solve", shipped)
    assert f"rates of cpu: seen here on {DAY}" in solved.err
    as_data = run_command("llamaplan", "solve", shipped, "--json")
    assert DAY in json.loads(as_data.out)["origins"][0]


def measurement(
    profile: ModelProfile, *, devices: list[str], seconds: float = 0.001, weights: PackedName | None = None
) -> MeasuredCluster:
    timings = Timings(
        profile=profile.layers[0].shapes_sha256,
        dtype=profile.dtype,
        weights=weights,
        decode_seconds_per_layer=((16, 1, seconds),),
        prefill_seconds_per_layer=((16, 0, 1, seconds),),
        embedding_seconds=((1, seconds),),
        head_seconds=((1, seconds),),
    )
    cluster = load_cluster(devices=devices)
    measured = tuple(device.model_copy(update={"timings": (timings,)}) for device in cluster.devices)
    hosts = tuple(host.model_copy(update={"process_overhead_bytes": 12345}) for host in cluster.hosts)
    names = tuple(device.name for device in measured)
    return MeasuredCluster(cluster.model_copy(update={"devices": measured, "hosts": hosts}), names, ())


def test_a_measurement_is_remembered_for_every_way_to_name_the_device(profile: ModelProfile, looks: Looks) -> None:
    assert known.remember_measurement(measurement(profile, devices=["2xcpu=1GiB"]), profile)
    for devices in (None, ["cpu=2GiB"], ["3xcpu=1GiB"]):
        found = known.with_known(load_cluster(devices=devices), profile=profile)
        assert all(device.timings[0].head_seconds == ((1, 0.001),) for device in found.cluster.devices)
        assert found.cluster.hosts[0].process_overhead_bytes == 12345
        assert found.origins == (f"times of cpu: measured here on {DAY}; --no-probe plans without",)
    assert looks.count == 0


def test_a_measurement_holds_for_its_shape_and_dtype_alone(profile: ModelProfile, shipped: Path, looks: Looks) -> None:
    known.remember_measurement(measurement(profile, devices=["cpu=1GiB"]), profile)
    other = build_profile(open_checkpoint(shipped), dtype="bf16")
    assert known.with_known(load_cluster(), profile=other).cluster.device("cpu").timings == ()
    assert looks.count == 1


def test_widths_are_remembered_beside_each_other(profile: ModelProfile, looks: Looks) -> None:
    """Of what was not measured the look says how fast it will be."""
    known.remember_measurement(measurement(profile, devices=["cpu=1GiB"]), profile)
    known.remember_measurement(measurement(profile, devices=["cpu=1GiB"], weights="int4"), profile)
    found = known.with_known(load_cluster(), profile=profile, widths=["int4"])
    assert {t.weights for t in found.cluster.device("cpu").timings} == {None, "int4"}
    assert found.origins == (f"times of cpu (fp32, int4): measured here on {DAY}; --no-probe plans without",)
    assert looks.count == 0
    more = known.with_known(load_cluster(), profile=profile, widths=["int4", "int8"])
    assert more.cluster.device("cpu").timings == found.cluster.device("cpu").timings
    assert (looks.count, rates(more.cluster)[0]) == (1, 0.93 * 30e9)
    assert [line.split(":")[0] for line in more.origins] == ["times of cpu (fp32, int4)", "rates of cpu"]


def test_several_cpu_devices_share_what_this_machine_reads(profile: ModelProfile, shipped: Path) -> None:
    seen = known.with_known(load_cluster(devices=["2xcpu=1GiB"])).cluster
    assert seen.hosts[0].memory_bandwidth_bytes_per_second == 0.93 * 30e9
    assert known.with_known(load_cluster()).cluster.hosts[0].memory_bandwidth_bytes_per_second is None
    known.remember_measurement(measurement(profile, devices=["cpu=1GiB"]), profile)
    measured = known.with_known(load_cluster(devices=["2xcpu=1GiB"]), profile=profile).cluster
    layer_bytes = profile.layers[0].weight_bytes + 16 * profile.layers[0].kv_bytes_per_token
    assert measured.hosts[0].memory_bandwidth_bytes_per_second == layer_bytes / 0.001


def test_the_last_measurement_counts(profile: ModelProfile) -> None:
    for seconds in (0.001, 0.002):
        known.remember_measurement(measurement(profile, devices=["cpu=1GiB"], seconds=seconds), profile)
    found = known.with_known(load_cluster(), profile=profile)
    assert found.cluster.device("cpu").timings[0].head_seconds == ((1, 0.002),)


def test_whoever_asks_what_is_known_loads_no_torch() -> None:
    program = "import sys; import planner.measure.known; print('torch' in sys.modules, 'transformers' in sys.modules)"
    home = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=home, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
