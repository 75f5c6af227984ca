"""A plan for a GGUF file: llama.cpp is given the file itself and loads what the plan says; nobody else is."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from export_helpers import make_plan

from exporter.emit import emit
from plans.engines.rules import llama_cpp_owners
from plans.engines.spelling import ENGINES, parse_partition
from plans.errors import UsageError
from plans.plan import Plan
from tests.conftest import RunCommand
from tests.gguf_files import config_for, write_gguf


def plan_for(folder: Path, cut: Sequence[int], devices: Sequence[str], **changes: object) -> Plan:
    raw = config_for("llama", num_hidden_layers=sum(cut), **changes)
    return make_plan(write_gguf(folder / "tiny.gguf", raw), cut, devices=devices, hosts=["here"] * len(cut))


def arguments_of(plan: Plan, folder: Path, directory: str) -> list[str]:
    """What the script runs llama-server with."""
    (script,) = emit(plan, engine="llama.cpp", directory=directory).files.values()
    (folder / "llama-server").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "llama-server").chmod(0o755)
    done = subprocess.run(
        ["sh"], input=script, env={"PATH": f"{folder}:/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


CUTS = {
    "GPUs": ([3, 4], ["cuda:0", "cuda:1"]),
    "a CPU first": ([2, 5, 3], ["cpu", "cuda:0", "cuda:1"]),
    "the embedding alone on the CPU": ([0, 4], ["cpu", "cuda:0"]),
    "CPU": ([4], ["cpu"]),
}


@pytest.mark.parametrize("case", CUTS)
def test_the_script_loads_the_file_where_the_plan_says(case: str, tmp_path: Path) -> None:
    cut, devices = CUTS[case]
    plan = plan_for(tmp_path, cut, devices)
    arguments = arguments_of(plan, tmp_path, "my models/tiny.gguf")
    assert option(arguments, "-m") == "my models/tiny.gguf"
    assert [option(arguments, f"--cache-type-{which}") for which in "kv"] == ["f16", "f16"]
    assert "--override-tensor" not in arguments
    gpus = [i for i, device in enumerate(devices) if device != "cpu"]
    if not gpus:
        assert option(arguments, "-ngl") == "0"
        return
    split = [float(part) for part in option(arguments, "--tensor-split").split(",")]
    owners = llama_cpp_owners(sum(cut), split=split, num_gpu_layers=int(option(arguments, "-ngl")))
    on_cpu = [None] * (cut[0] if devices[0] == "cpu" else 0)
    assert list(owners[:-1]) == on_cpu + [rank for rank, i in enumerate(gpus) for _ in range(cut[i])]
    assert owners[-1] == len(gpus) - 1


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_head_alone_on_the_cpu_is_told_by_its_tensors(is_tied: bool, tmp_path: Path) -> None:
    plan = plan_for(tmp_path, [2, 3, 0], ["cuda:0", "cuda:1", "cpu"], tie_word_embeddings=is_tied)
    arguments = arguments_of(plan, tmp_path, "tiny.gguf")
    pattern, _, place = option(arguments, "--override-tensor").rpartition("=")
    assert place == "CPU"
    moved = {name for name in ("token_embd.weight", "output.weight", "output_norm.weight", "blk.0.attn_output.weight")
             if re.search(pattern, name)}  # fmt: skip
    assert moved == {"token_embd.weight" if is_tied else "output.weight", "output_norm.weight"}
    split = option(arguments, "--tensor-split") + "/ngl=" + option(arguments, "-ngl")
    assert parse_partition(f"llama.cpp:{split}", num_layers=5).layers == (2, 3)


FOLDERS = {"models": "models/tiny.gguf", "models/": "models/tiny.gguf", "-m": "./-m/tiny.gguf", ".": "./tiny.gguf",
           "-x.gguf": "./-x.gguf", "x.gguf/": "x.gguf/tiny.gguf", "/": "/tiny.gguf"}  # fmt: skip


@pytest.mark.parametrize("directory", FOLDERS)
def test_the_file_or_its_folder_may_be_named(directory: str, tmp_path: Path) -> None:
    arguments = arguments_of(plan_for(tmp_path, [3, 4], ["cuda:0", "cuda:1"]), tmp_path, directory)
    assert option(arguments, "-m") == FOLDERS[directory]


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "llama.cpp"])
def test_no_other_engine_is_given_such_a_plan(engine: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"made for a GGUF file .*--for llama\.cpp takes it"):
        emit(plan_for(tmp_path, [3, 4], ["cuda:0", "cuda:1"]), engine=engine)


def test_every_command_that_plans_takes_a_file(tmp_path: Path, run_command: RunCommand) -> None:
    model = write_gguf(tmp_path / "tiny{}.gguf", config_for("llama"))
    plan, script = tmp_path / "plan.json", tmp_path / "run.sh"
    devices = ["--device", "cpu=2GiB", "--device", "cuda:0=2GiB", "--layers", "1,2"]
    solved = run_command("llamaplan", "solve", model, *devices, "-o", plan)
    assert solved.code == 0
    assert f"next: llamaplan emit {plan} --for llama.cpp --directory {model} -o llama_cpp.sh" in solved.err
    assert "GGUF: " in solved.out
    for arguments in (
        ["analyze", model],
        ["show", plan],
        ["check", plan, "--model", model],
        ["compare", model, "--device", "cpu=2GiB"],
        ["compare", plan],
        ["report", plan, "--no-compare", "-o", tmp_path / "report.html"],
        ["emit", plan, "--for", "llama.cpp", "--directory", model, "-o", script],
    ):
        done = run_command("llamaplan", *arguments)
        assert done.code == 0, done.err
    assert f"gguf={model}" in script.read_text()


def test_a_file_is_refused_by_name_where_weights_are_run(tmp_path: Path, run_command: RunCommand) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", config_for("llama"))
    plan = tmp_path / "plan.json"
    assert run_command("llamaplan", "solve", model, "--device", "cpu=2GiB", "-o", plan).code == 0
    for command, *arguments in (
        ["llamaplan", "devices", model, "--measure"],
        ["llamarun", "generate", model, "-p", "a"],
        ["llamarun", "generate", plan, "--model", model, "-p", "a"],
        ["llamarun", "bench", model],
    ):
        done = run_command(command, *arguments)
        assert done.code == 3, done.err
        assert "is a GGUF file; it can be planned and exported" in done.err
        assert "emit PLAN --for llama.cpp" in done.err


def test_a_plan_is_checked_against_its_own_file(tmp_path: Path, run_command: RunCommand) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", config_for("llama"))
    plan = tmp_path / "plan.json"
    assert run_command("llamaplan", "solve", model, "--device", "cpu=2GiB", "-o", plan).code == 0
    write_gguf(model, config_for("llama"), kinds=lambda _name, shape: "F32" if len(shape) == 1 else "Q4_1")
    done = run_command("llamaplan", "check", plan, "--model", model)
    assert (done.code, "another model" in done.err) == (5, True)
