"""Measured curves of packed layers: what is timed, that a plan in each width follows its own, and what is kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from planner.measure.calibrate import calibrate
from planner.measure.cluster import replace_timings
from planner.measure.process import Footprint
from planner.measure.stand_in import Subject, subjects_of, write_stand_in
from planner.model.profile import build_profile
from planner.model.widths import measured_as, mixed, narrower_than, uniform
from planner.report.origins import decode_origin
from planner.timing.costs import CostModel
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.units import Checkpoint
from plans.cluster import Cluster, Device, Timings
from plans.plan import Plan
from plans.profile import ModelProfile, PackedName, UnitProfile
from plans.run import read_run
from plans.sensitivity import Sensitivity
from tests.conftest import RunCommand
from tests.planner.answers.test_ladder import sensitivity
from tests.planner.cases import EVEN, bare, cluster, device, in_width, workload
from tests.planner.measure.test_calibrate import document
from tests.planner.measure.test_measure import with_short_context

PLAIN = build_profile(bare(**EVEN))
SHAPE = PLAIN.layers[0].shapes_sha256
WIDTHS: tuple[PackedName | None, ...] = (None, "int8", "int4")


def curves(weights: PackedName | None, seconds: float, *, path: str = "fast") -> Timings:
    """One point of everything."""
    return Timings(
        profile=SHAPE,
        dtype="bf16",
        weights=weights,
        path=path,
        decode_seconds_per_layer=((192, 1, seconds),),
        prefill_seconds_per_layer=((128, 0, 1, 10 * seconds),),
        head_seconds=((1, 3 * seconds),),
    )


def ends(seconds: float, weights: PackedName | None = None) -> Timings:
    """What is measured of an embedding, or of a head, beside layers that are stored otherwise."""
    table = "embedding_seconds" if weights is None else "head_seconds"
    return Timings(profile=SHAPE, dtype="bf16", weights=weights, path="fast", **{table: ((1, seconds),)})  # type: ignore[arg-type]


def all_widths() -> Device:
    return device("cpu", timings=(curves(None, 0.04), curves("int8", 0.02), curves("int4", 0.01), ends(0.5)))


# --- a plan follows the curves of its own width -------------------------------------------------------------------


def test_a_mix_of_widths_adds_up_its_layers_by_the_curves_of_each() -> None:
    checkpoint = bare(**EVEN)
    eight, four = (uniform(checkpoint, PLAIN, width) for width in ("int8", "int4"))
    profile = mixed(eight, four, {1, 3}).profile
    model = CostModel(profile, workload=workload(), cluster=cluster(all_widths()))
    seconds = [model.decode_seconds(unit, "cpu") for unit in profile.units]
    num = len(profile.layers)
    assert seconds == [0.5, *(0.01 if index in (1, 3) else 0.02 for index in range(num)), 0.06]
    assert all(model.is_measured(unit, "cpu") for unit in profile.units)


def test_a_width_that_was_not_measured_is_estimated_as_without_any_curve() -> None:
    profile = in_width("int4").profile
    known, unknown = (
        CostModel(profile, workload=workload(), cluster=cluster(device("cpu", timings=timings)))
        for timings in ((curves("int8", 0.02), curves(None, 0.04)), ())
    )
    layer = profile.layers[0]
    assert known.decode_seconds(layer, "cpu") == unknown.decode_seconds(layer, "cpu") < 0.01
    assert not known.is_measured(layer, "cpu")


# --- what replaces what -------------------------------------------------------------------------------------------


def test_measuring_a_width_keeps_the_other_widths() -> None:
    known = replace_timings((), [curves(None, 1.0, path="reference"), curves(None, 1.0), ends(0.5)])
    both = replace_timings(known, [curves("int4", 2.0), ends(7.0), ends(8.0, "int8")])
    assert both[0].embedding_seconds == ((1, 0.5),), "measured with layers of its own width"
    assert both[1:] == (curves("int4", 2.0), ends(8.0, "int8"), known[1])
    again = replace_timings(both, [curves(None, 3.0)])
    assert again == (curves(None, 3.0), curves("int4", 2.0), ends(8.0, "int8")), "a path that serves no more is gone"


def test_ends_without_layers_are_replaced_and_complete_layers_that_lack_them() -> None:
    assert replace_timings([ends(1.0)], [ends(2.0)]) == (ends(2.0),)
    (found,) = replace_timings([curves(None, 1.0)], [ends(2.0)])
    assert (found.embedding_seconds, found.head_seconds) == (((1, 2.0),), ((1, 3.0),))
    (found,) = replace_timings([ends(1.0, "int8")], [curves("int8", 2.0)])
    assert found == curves("int8", 2.0)


def test_calibration_fills_in_what_the_curves_of_a_width_lack(tmp_path: Path) -> None:
    """Only an embedding beside int4 layers was measured of bf16; the run's layers are in bf16."""
    parts = [device(f"cpu#{i}", timings=(curves("int4", 0.01), ends(0.001))) for i in range(2)]
    (tmp_path / "run.json").write_text(json.dumps(document(PLAIN)))
    found = calibrate(cluster(*parts), PLAIN, read_run(tmp_path / "run.json"), where="run.json")
    model = CostModel(PLAIN, workload=found.workload, cluster=found.cluster)
    for drift in found.stages:
        assert model.stage_decode_seconds(drift.stage) == pytest.approx(drift.measured_decode_seconds)


# --- what is timed ------------------------------------------------------------------------------------------------


def test_every_width_that_solve_chooses_from_can_be_asked_for() -> None:
    checkpoint = bare(**EVEN)
    asked = {w: measured_as(checkpoint, PLAIN, weights=w) for w in (None, "bf16", "int8", "int4", "auto")}
    names = {w: [None if f is None else f.choice.kind for f in found] for w, found in asked.items()}
    assert names == {None: [None], "bf16": [None], "int8": ["int8"], "int4": ["int4"], "auto": [None, "int8", "int4"]}


@pytest.mark.parametrize("width", ["int8", "int4"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_stand_in_is_as_large_as_what_the_plan_counts(width: PackedName, is_tied: bool, tmp_path: Path) -> None:
    checkpoint = bare(**EVEN | {"tie_word_embeddings": is_tied, "num_hidden_layers": 9})
    plain = build_profile(checkpoint)
    (subject,) = subjects_of(checkpoint, plain, uniform(checkpoint, plain, width))
    stand_in = written(subject, tmp_path, num_layers=2)
    found, planned = build_profile(stand_in), subject.profile
    assert len(found.layers) == 2
    for mine, theirs in ((found.layers[0], planned.layers[0]), (found.head, planned.head)):
        assert (mine.weight_bytes, mine.weights) == (theirs.weight_bytes, theirs.weights)
    assert found.embedding.weight_bytes == planned.embedding.weight_bytes


def test_a_model_of_unlike_layers_is_timed_in_each_way_they_are_stored(
    packed_shipped: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(packed_shipped("mixed"))
    plain = build_profile(checkpoint)
    subjects = subjects_of(checkpoint, plain, None)
    assert {subject.weights for subject in subjects} == set(WIDTHS)
    for subject in subjects:
        like = next(layer for layer in plain.layers if layer.weights == subject.weights)
        stand_in = build_profile(written(subject, tmp_path / str(subject.weights), num_layers=2))
        assert {layer.shapes_sha256 for layer in stand_in.layers} == {like.shapes_sha256}
        assert subject.profile.layers[0].shapes_sha256 == like.shapes_sha256


def written(subject: Subject, folder: Path, *, num_layers: int) -> Checkpoint:
    assert subject.scheme_of is not None
    folder.mkdir(exist_ok=True)
    return write_stand_in(
        folder, subject.source, scheme_of=subject.scheme_of, num_layers=num_layers, dtype=subject.profile.dtype
    )


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, shipped: Path) -> Path:
    return with_short_context(shipped, tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def stated_footprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is started for every width to see what memory it needs: tests of a single width start theirs."""
    monkeypatch.setattr("planner.measure.cluster.measure_footprint", lambda *_: Footprint(300 << 20, 0))


@pytest.mark.usefixtures("stated_footprint")
def test_one_width_after_another_ends_up_in_one_cluster_file(
    run_command: RunCommand, small: Path, tmp_path: Path
) -> None:
    """Each plan rests on the curves of its own width, and can be recomputed, simulated and compared."""
    path = tmp_path / "cluster.json"
    offered = ["--device", "cpu=1GiB"]
    for width in ("int4", "bf16", "int8"):
        done = run_command("llamaplan", "devices", small, "--measure", "--weights", width, *offered, "-o", path)
        assert done.code == 0, done.err
        offered = ["--cluster", str(path)]
    (here,) = Cluster.read(path).devices
    shape = build_profile(open_checkpoint(small)).layers[0].shapes_sha256
    assert {t.profile for t in here.timings} == {shape}
    assert {t.weights for t in here.timings if t.decode_seconds_per_layer} == set(WIDTHS)
    assert f"of layer {shape[:12]} in int4 measured" in done.out
    plans = {width: tmp_path / f"{width}.json" for width in ("bf16", "int8", "int4")}
    for width, plan in plans.items():
        assert_rests_on_curves(run_command, small, path, width, plan)
    for command in (
        ["simulate", plans["int4"]],
        ["report", plans["int4"], "-o", tmp_path / "report.html"],
        ["compare", small, "--cluster", path, "--weights", "int4"],
    ):
        done = run_command("llamaplan", *command)
        assert done.code == 0, done.err


def assert_rests_on_curves(run_command: RunCommand, model: Path, path: Path, width: str, plan: Path) -> None:
    done = run_command("llamaplan", "solve", model, "--cluster", path, "--weights", width, "-o", plan)
    assert done.code == 0, done.err
    known = Plan.read(plan)
    costs = CostModel(known.profile, workload=known.workload, cluster=known.cluster)
    assert decode_origin(known.stages[0], costs) == "measured"
    assert known.proof.certified_by is not None
    assert run_command("llamaplan", "check", plan, "--model", model).code == 0


def test_the_ladder_adds_layers_of_both_widths(run_command: RunCommand, small: Path, tmp_path: Path) -> None:
    path, plan, sens = (tmp_path / name for name in ("cluster.json", "plan.json", "sens.json"))
    profile = build_profile(open_checkpoint(small))
    rows: dict[PackedName | None, float] = {None: 0.04, "int8": 0.02, "int4": 0.01}
    shape = profile.layers[0].shapes_sha256
    timings = [curves(width, seconds).model_copy(update={"profile": shape}) for width, seconds in rows.items()]
    path.write_text(cluster(device("cpu", timings=tuple(timings))).to_json())
    num = len(profile.layers)
    sens.write_text(costing(profile, (0.001,) * num).to_json())
    done = run_command(
        "llamaplan", "solve", small, "--cluster", path, "--weights", "auto", "--sensitivity", sens,
        "--max-error", "0.0025", "--prompt-tokens", "16", "-n", "16", "-o", plan,
    )  # fmt: skip
    assert done.code == 0, done.err
    known = Plan.read(plan)
    assert known.weights is not None
    narrow = known.weights.layer_bits.count(4)
    assert 0 < narrow < num
    costs = CostModel(known.profile, workload=known.workload, cluster=known.cluster)
    layers = [costs.decode_seconds(layer, "cpu") for layer in known.profile.layers]
    one = {width: costs.decode_seconds(layer_in(known, width), "cpu") for width in ("int8", "int4")}
    assert sum(layers) == pytest.approx(narrow * one["int4"] + (num - narrow) * one["int8"])
    assert one["int8"] > 1.5 * one["int4"]


def layer_in(plan: Plan, width: str) -> UnitProfile:
    return next(layer for layer in plan.profile.layers if layer.weights == width)


def costing(profile: ModelProfile, int4: tuple[float, ...]) -> Sensitivity:
    """Sensitivities of a model."""
    found = sensitivity(int4)
    subject = found.subject.model_copy(
        update={"config_sha256": profile.model.config_sha256, "shards": profile.model.shards}
    )
    return found.model_copy(update={"subject": subject, "head_int8": None if profile.tied else 1e-5})


@pytest.mark.parametrize("kind", ["int4 g64", "mixed"])
def test_a_packed_checkpoint_is_timed_as_it_is_stored(
    run_command: RunCommand,
    packed_shipped: Callable[[str], Path],
    kind: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if kind == "mixed":
        request.getfixturevalue("stated_footprint")
    model = with_short_context(packed_shipped(kind), tmp_path / "model")
    path, plan = tmp_path / "cluster.json", tmp_path / "plan.json"
    done = run_command("llamaplan", "devices", model, "--measure", "--device", "cpu=1GiB", "-o", path)
    assert done.code == 0, done.err
    profile = build_profile(open_checkpoint(model))
    timed = {(t.profile, t.weights) for t in Cluster.read(path).devices[0].timings if t.decode_seconds_per_layer}
    assert timed == {(layer.shapes_sha256, layer.weights) for layer in profile.layers}
    assert run_command("llamaplan", "solve", model, "--cluster", path, "-o", plan).code == 0
    known = Plan.read(plan)
    costs = CostModel(known.profile, workload=known.workload, cluster=known.cluster)
    assert decode_origin(known.stages[0], costs) == "measured"


def test_a_bare_configuration_is_measured_in_a_width(run_command: RunCommand, shipped: Path, tmp_path: Path) -> None:
    config = json.loads((shipped / "config.json").read_text()) | {"num_hidden_layers": 1, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run_command("llamaplan", "devices", tmp_path / "config.json", "--measure", "--weights", "int8", "--json")
    assert done.code == 0, done.err
    timings = json.loads(done.out)["devices"][-1]["timings"]
    assert "int8" in {entry.get("weights") for entry in timings if entry["decode_seconds_per_layer"]}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["MODEL", "--weights", "int4"], 2, "belong to --measure"),
        (["--measure", "--weights", "int4"], 2, "name a model"),
        (["MODEL", "--measure", "--weights", "int4", "--dtype", "fp32"], 2, "--dtype bf16"),
        (["PACKED", "--measure", "--weights", "int8"], 2, "quantised already"),
        (["PACKED", "--measure", "--weights", "auto"], 2, "quantised already"),
        (["MODEL", "--measure", "--weights", "int3"], 2, "int3"),
    ],
)
def test_bad_requests_are_refused(
    run_command: RunCommand, shipped: Path, packed_shipped: Callable[[str], Path],
    arguments: list[str], code: int, says: str,
) -> None:  # fmt: skip
    places = {"MODEL": shipped, "PACKED": packed_shipped("int4")} if "PACKED" in arguments else {"MODEL": shipped}
    done = run_command("llamaplan", "devices", *(places.get(argument, argument) for argument in arguments))
    assert (done.code, says in done.err) == (code, True), done.err


def test_no_room_for_a_stand_in_is_a_fault_of_the_machine(
    run_command: RunCommand, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(full))
    monkeypatch.setattr(shutil, "copyfile", no_room)
    done = run_command("llamaplan", "devices", small, "--measure", "--weights", "int4")
    assert (done.code, "TMPDIR" in done.err) == (6, True), done.err
    assert list(full.iterdir()) == []


def no_room(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_narrower_widths_are_those_that_are_measured() -> None:
    checkpoint = bare(**EVEN)
    offered = [found.choice for found in narrower_than(checkpoint, PLAIN, None)]
    assert offered == [found.choice for found in measured_as(checkpoint, PLAIN, weights="auto") if found is not None]


def test_solve_says_which_widths_are_estimates(run_command: RunCommand, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    shape = build_profile(open_checkpoint(small)).layers[0].shapes_sha256
    path.write_text(
        cluster(device("cpu", timings=(curves(None, 0.01).model_copy(update={"profile": shape}),))).to_json()
    )
    said = {
        weights: run_command("llamaplan", "solve", small, "--cluster", path, "--weights", weights).err
        for weights in ("bf16", "int4", "auto")
    }
    assert "estimates" not in said["bf16"]
    assert "cpu: times of layers in int4 are estimates, those in bf16 were measured" in said["int4"]
    assert "--measure --weights int4" in said["int4"]
    assert "in int4 and int8 are estimates" in said["auto"]
    assert "--measure --weights auto" in said["auto"]
