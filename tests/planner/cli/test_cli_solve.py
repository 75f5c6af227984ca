"""`llamaplan solve`, `show` and `check` as a person meets them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plans.plan import Plan
from tests.conftest import RunCommand

EXAMPLES = Path(__file__).parents[3] / "plans" / "examples"
DEVICES = ("--device", "cpu=700MiB", "--device", "cpu=4MiB")


def test_solve_writes_a_plan_that_show_and_check_accept(run_command: RunCommand, shipped: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    solved = run_command("llamaplan", "solve", shipped, *DEVICES, "--strategy", "mixed", "-o", path)
    assert (solved.code, "optimal: weighted sum" in solved.out) == (0, True)
    assert f"next: llamaplan export {path} --model {shipped} -o shards/" in solved.err
    plan = Plan.read(path)
    assert plan.proof.status == "optimal"
    shown = run_command("llamaplan", "show", path)
    assert (shown.code, shown.out) == (0, solved.out)
    checked = run_command("llamaplan", "check", path, "--model", shipped)
    assert (checked.code, "sound" in checked.out) == (0, True)


def test_two_runs_write_the_same_bytes(run_command: RunCommand, shipped: Path, tmp_path: Path) -> None:
    for name in ("one.json", "two.json"):
        assert run_command("llamaplan", "solve", shipped, *DEVICES, "-o", tmp_path / name).code == 0
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_json_is_one_document_and_quiet_says_nothing_else(run_command: RunCommand, shipped: Path) -> None:
    done = run_command("llamaplan", "solve", shipped, *DEVICES, "--json", "-q")
    document = json.loads(done.out)
    assert document["proof"]["status"] == "optimal"
    assert document["solve_seconds"] > 0
    assert done.err == ""


def test_a_cut_of_no_text_is_refused_as_no_cut(run_command: RunCommand, shipped: Path) -> None:
    done = run_command("llamaplan", "solve", shipped, *DEVICES, "--layers", "")
    assert (done.code, "--layers '' is not understood; expected 18,10,4" in done.err) == (2, True)


def test_every_option_is_understood(run_command: RunCommand, shipped: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    done = run_command(
        "llamaplan", "solve", shipped, *DEVICES, "--strategy", "compute", "--objective", "throughput", "-c", 512,
        "--prompt-tokens", 100, "--new-tokens", 50, "--batch-size", 2, "--requests-in-flight", 3, "--prefill-chunk", 64,
        "--dtype", "fp32", "--kv-cache-dtype", "fp32", "--execution", "process_per_stage", "--margin", "5%",
        "--time-limit", 30, "--mip-gap", 0, "--solver", "cbc", "--keep-order", "--use-all", "--pin", "0-2@cpu#0",
        "--ban", "embedding@cpu#1", "-o", path,
    )  # fmt: skip
    assert done.code == 4, done.err  # process_per_stage: the second device has no room for a process
    assert "shortage" in done.err
    roomy = ("--device", "cpu=700MiB", "--device", "cpu=700MiB")
    done = run_command(
        "llamaplan", "solve", shipped, *roomy, "--objective", "throughput", "-c", 512, "--prompt-tokens", 100, "-n", 50,
        "--batch-size", 2, "--requests-in-flight", 3, "--prefill-chunk", 64, "--dtype", "fp32",
        "--execution", "process_per_stage", "--solver", "cbc", "--keep-order", "--use-all", "--pin", "0-2@cpu#0",
        "-o", path,
    )  # fmt: skip
    assert done.code == 0, done.err
    plan = Plan.read(path)
    assert (plan.proof.solver, plan.execution, plan.objective) == ("CBC", "process_per_stage", "throughput")
    work = plan.workload
    assert (work.context_tokens, work.prompt_tokens, work.new_tokens, work.batch_size) == (512, 100, 50, 2)
    assert (work.requests_in_flight, work.prefill_chunk_tokens, work.dtype) == (3, 64, "fp32")
    assert [stage.device for stage in plan.stages] == ["cpu#0", "cpu#1"]


def test_layers_alone_mean_custom(run_command: RunCommand, shipped: Path) -> None:
    done = run_command("llamaplan", "solve", shipped, *DEVICES, "--layers", "5,2", "--json")
    document = json.loads(done.out)
    assert document["strategy"] == "custom"
    assert [s["end_layer"] - s["start_layer"] for s in document["stages"]] == [5, 2]


def test_infeasible_leaves_with_four_and_writes_nothing(run_command: RunCommand, shipped: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    done = run_command("llamaplan", "solve", shipped, "--device", "cpu=2MiB", "-o", path)
    assert done.code == 4
    assert done.err.startswith("error[E-INFEASIBLE]: python-llama: no plan fits: the smallest shortage is ")
    assert not path.exists()


@pytest.mark.row("X7")
@pytest.mark.parametrize(
    "options",
    [
        ("--strategy", "best"),
        ("--objective", "speed"),
        ("--weight", "2"),
        ("--weight", "nan"),
        ("--time-limit", "0"),
        ("--time-limit", "-1"),
        ("--time-limit", "nan"),
        ("--time-limit", "inf"),
        ("--mip-gap", "1"),
        ("--mip-gap", "-0.1"),
        ("--solver", "gurobi"),
        ("--execution", "threads"),
        ("--layers", "1,2"),
        ("--layers", "3,4", "--strategy", "memory"),
        ("--pin", "0@gpu"),
        ("--ban", "x"),
        ("--batch-size", "0"),
        ("--requests-in-flight", "0"),
        ("--prefill-chunk", "0"),
        ("--prefill-chunk", "best"),
        ("--prefill-chunk", "9999999999999"),
        ("--new-tokens", "-1"),
        ("--prompt-tokens", "0"),
        ("--ctx-size", "10", "--prompt-tokens", "8", "--new-tokens", "8"),
        ("--dtype", "int4"),
        ("--device", "cpu=700MiB", "--cluster", "x.json"),
        ("--frobnicate",),
    ],
)
def test_bad_options_are_usage_errors(run_command: RunCommand, shipped: Path, options: tuple[str, ...]) -> None:
    done = run_command("llamaplan", "solve", shipped, *DEVICES, *options)
    assert done.code == 2
    assert done.err.startswith("error[E-USAGE]: ")
    assert len(done.err.splitlines()) == 1


def test_output_is_never_written_into_the_checkpoint(run_command: RunCommand, shipped: Path) -> None:
    done = run_command("llamaplan", "solve", shipped, *DEVICES, "-o", shipped / "plan.json")
    assert (done.code, "inside the checkpoint" in done.err) == (2, True)
    assert not (shipped / "plan.json").exists()


def test_missing_folder_for_the_output_is_named(run_command: RunCommand, shipped: Path, tmp_path: Path) -> None:
    done = run_command("llamaplan", "solve", shipped, *DEVICES, "-o", tmp_path / "no" / "plan.json")
    assert done.code == 6
    assert str(tmp_path / "no") in done.err


def test_this_machine_is_the_default_cluster(run_command: RunCommand, shipped: Path) -> None:
    done = run_command("llamaplan", "solve", shipped, "--json")
    assert done.code == 0
    assert "cpu" in [device["name"] for device in json.loads(done.out)["cluster"]["devices"]]


def test_edited_plan_does_not_pass_the_check(run_command: RunCommand, shipped: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    run_command("llamaplan", "solve", shipped, *DEVICES, "-o", path)
    document = json.loads(path.read_text())
    document["prediction"]["seconds_per_token"] /= 2
    path.write_text(json.dumps(document))
    done = run_command("llamaplan", "check", path)
    assert (done.code, "/prediction/seconds_per_token" in done.err) == (5, True)


@pytest.mark.row("L16")
def test_two_planners_in_one_folder_do_not_meet(shipped: Path, tmp_path: Path) -> None:
    program = "from planner.cli import main; main()"
    command = [sys.executable, "-c", program, "solve", str(shipped), *DEVICES, "--solver", "cbc", "-q", "-o"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "TMPDIR": str(tmp_path)}
    runs = [
        subprocess.Popen(
            [*command, str(tmp_path / f"{i}.json")], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
        )
        for i in range(2)
    ]
    assert [run.wait(200) for run in runs] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json"]
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()


OVERSIZED = {
    "rtx4090=48GiB": "rtx4090=48.0 GiB is more than the 24.0 GiB of one rtx4090",
    "2xrtx3060=13GiB": "rtx3060=13.0 GiB is more than the 12.0 GiB of one rtx3060",
    "cpu=100TiB": "in all is more than the",
    "rtx4090=24GiB": None,
    "cuda:7=900GiB": None,  # nothing is known of it
    "rtx4090": None,
}


@pytest.mark.parametrize("device", OVERSIZED)
def test_a_budget_beyond_the_devices_memory_is_planned_with_a_warning(
    run_command: RunCommand, shipped: Path, device: str
) -> None:
    says = OVERSIZED[device]
    for command in (["solve", shipped, "--device", device], ["devices", "--device", device]):
        done = run_command("llamaplan", *command)
        assert done.code == 0, done.err
        assert ("warning: --device" in done.err) == (says is not None)
        assert says is None or says in done.err


def test_packed_weights_are_planned_shown_compared_and_reported(
    shipped: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    cluster, plan, page = EXAMPLES / "demo.json", tmp_path / "plan.json", tmp_path / "report.html"
    asked = (shipped, "--cluster", cluster, "-c", "512")
    done = run_command("llamaplan", "solve", *asked, "--weights", "int4", "-o", plan)
    assert done.code == 0, done.err
    line = "weights: 7 layers in int4 (groups of 32), the head in int8, the rest in bf16; 2.63 MiB in all"
    assert "7 layers in int4, context 512" in done.out
    assert line in done.out
    assert line in run_command("llamaplan", "show", plan).out
    assert run_command("llamaplan", "check", plan, "--model", shipped).code == 0
    assert run_command("llamaplan", "simulate", plan, "--requests", "3").code == 0
    unpacked = run_command("llamarun", "generate", plan, "--model", shipped, "-p", "x")
    assert unpacked.code == 2
    assert f"pack them: llamaplan export {plan} --model {shipped} -o shards/" in unpacked.err
    assert run_command("llamaplan", "report", plan, "--no-compare", "-o", page).code == 0
    assert "Weights: 7 layers in int4" in page.read_text(encoding="utf-8")
    best = pytest.approx(Plan.read(plan).prediction.seconds_per_token)
    options = (*asked, "--weights", "int4", "--json")
    frontier = json.loads(run_command("llamaplan", "frontier", *options, "--against", "devices").out)
    assert frontier["time_against_number_of_devices"][-1]["seconds"] == best
    compared = json.loads(run_command("llamaplan", "compare", *options).out)
    seconds = {row["name"]: row.get("seconds_per_token") for row in compared["rows"]}
    assert seconds["compute"] == best


def test_auto_takes_the_widest_width_that_fits_and_says_which(
    shipped: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    cluster = json.loads((EXAMPLES / "demo.json").read_text(encoding="utf-8"))
    cluster["devices"] = [d | {"budget_bytes": "3000KiB"} for d in cluster["devices"] if d["name"] == "cuda:0"]
    (tmp_path / "one.json").write_text(json.dumps(cluster), encoding="utf-8")
    asked = (shipped, "--cluster", tmp_path / "one.json", "-c", "32", "--prompt-tokens", "16")
    refused = run_command("llamaplan", "solve", *asked)
    assert refused.code == 4
    assert "any one of these would do: --weights int4 (2.63 MiB of weights; its best plan takes" in refused.err
    done = run_command("llamaplan", "solve", *asked, "--weights", "auto")
    assert done.code == 0, done.err
    assert "int4 is the widest in which the model fits" in done.err


def test_options_about_weights_that_say_nothing_together_are_refused(shipped: Path, run_command: RunCommand) -> None:
    for arguments, said in (
        (("--head-weights", "int8"), "belongs to packed layers"),
        (("--weights", "int4", "--max-error", "1"), "belongs to --weights auto with --sensitivity"),
        (("--sensitivity", "x.json"), "says what fewer bits cost"),
        (("--weights", "int8", "--dtype", "fp32"), "add --dtype bf16"),
    ):
        done = run_command("llamaplan", "solve", shipped, "--device", "cpu=1GiB", *arguments)
        assert done.code == 2
        assert said in done.err


@pytest.mark.row("L4")
def test_a_file_of_another_kind_is_called_what_it_is(run_command: RunCommand, shipped: Path) -> None:
    plan, cluster = next(EXAMPLES.glob("*plan*.json")), EXAMPLES / "demo.json"
    refused = run_command("llamaplan", "solve", shipped, "--cluster", plan)
    assert (refused.code, f"{plan}: is a plan; expected a file with devices" in refused.err) == (3, True), refused.err
    refused = run_command("llamaplan", "show", cluster)
    assert (refused.code, f"{cluster}: is a cluster; expected a file with strategy" in refused.err) == (3, True)
    refused = run_command("llamaplan", "check", shipped / "config.json")
    assert (refused.code, "config.json: is the configuration of a model; expected" in refused.err) == (3, True)
