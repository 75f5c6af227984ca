"""`llamaplan export`, `verify` and `emit` as a person meets them: streams, exit codes, hints."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from export_helpers import ROOT, edit_json, make_plan, names, tensor_bytes

from exporter.foreign.opening import open_origin
from exporter.values import find_bad_values

Run = Callable[..., Any]


@pytest.fixture
def plan_file(shipped: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(make_plan(shipped, [3, 2, 2], hosts=["a", "b", "a"]).to_json())
    return path


def test_export_then_verify_then_the_next_step(
    run_command: Run, shipped: Path, plan_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "my shards"
    done = run_command("llamaplan", "export", plan_file, "--model", shipped, "-o", out)
    assert done.code == 0, done.err
    assert "model-00001-of-00003.safetensors" in done.out
    assert "cuda:0: embedding, layers 0-2" in done.out
    assert "cuda:2: layers 5-6, head" in done.out
    assert done.err == f"next: llamarun generate '{out}' -p 'Once upon a time'\n"
    checked = run_command("llamaplan", "verify", out, "--model", shipped)
    assert checked.code == 0, checked.err
    assert f"{len(tensor_bytes(shipped))} tensors equal to the model's" in checked.out
    assert done.out.splitlines()[-1] == checked.out.splitlines()[-1]  # the export id


def test_json_output_is_one_document(run_command: Run, shipped: Path, plan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_command("llamaplan", "export", plan_file, "--model", shipped, "-o", out, "--json", "-q")
    manifest = json.loads(done.out)
    assert done.err == ""
    assert manifest == json.loads((out / "manifest.json").read_text())
    checked = run_command("llamaplan", "verify", out, "--json", "-q", "--expect-id", manifest["export_id"])
    assert json.loads(checked.out)["export_id"] == manifest["export_id"]


@pytest.mark.parametrize(("options", "written"), [(["--host", "a"], [1, 3]), (["--stage", "1"], [2])], ids=str)
def test_one_hosts_part(
    run_command: Run, shipped: Path, plan_file: Path, tmp_path: Path, options: list[str], written: list[int]
) -> None:
    out = tmp_path / "out"
    done = run_command("llamaplan", "export", plan_file, "--model", shipped, "-o", out, *options)
    assert done.code == 0, done.err
    assert [name for name in names(out) if name.endswith(".safetensors")] == [
        f"model-0000{i}-of-00003.safetensors" for i in written
    ]
    chosen = [part for i in written for part in ("--stage", str(i - 1))]
    assert f"llamaplan verify {out} {' '.join(chosen)}" in done.err
    assert run_command("llamaplan", "verify", out, *chosen).code == 0
    missing = run_command("llamaplan", "verify", out)
    assert missing.code == 5
    assert "is missing" in missing.err


USAGE: dict[str, tuple[list[str], str]] = {
    "no such host": (["--host", "z"], "expected a, b"),
    "host and stage": (["--host", "a", "--stage", "1"], "exclude each other"),
    "no such stage": (["--stage", "3"], "0 to 2"),
    "negative stage": (["--stage", "-1"], "0 to 2"),
    "stage is no number": (["--stage", "one"], "--stage"),
    "no such dtype": (["--dtype", "int8"], "bf16, fp16 or fp32"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_options_are_usage_errors(
    run_command: Run, shipped: Path, plan_file: Path, tmp_path: Path, case: str
) -> None:
    options, says = USAGE[case]
    done = run_command("llamaplan", "export", plan_file, "--model", shipped, "-o", tmp_path / "out", *options)
    assert done.code == 2
    assert says in done.err
    assert "Traceback" not in done.err
    assert names(tmp_path) == ["plan.json"]


def test_force_replaces_an_export(run_command: Run, shipped: Path, plan_file: Path, tmp_path: Path) -> None:
    arguments = ["export", plan_file, "--model", shipped, "-o", tmp_path / "out", "-q"]
    assert run_command("llamaplan", *arguments).code == 0
    refused = run_command("llamaplan", *arguments)
    assert refused.code == 6
    assert "already holds an export; choose another folder or give --force" in refused.err
    assert run_command("llamaplan", *arguments, "--dtype", "fp16", "--force").code == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["dtype"] == "fp16"


def test_another_revision_of_the_model_only_warns_with_both_hashes(
    run_command: Run, shipped: Path, plan_file: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(shipped, model)
    edit_json(model / "config.json", eos_token_id=1)
    done = run_command("llamaplan", "export", plan_file, "--model", model, "-o", tmp_path / "out")
    assert done.code == 0
    planned = json.loads(plan_file.read_text())["profile"]["model"]["config_sha256"]
    assert "another revision" in done.err
    assert planned in done.err


ALTERED: dict[str, Callable[[dict[str, Any]], object]] = {
    "weight bytes of a layer": lambda p: p["profile"]["units"][1].update(weight_bytes=2),
    "stored bytes of a layer": lambda p: p["profile"]["units"][1].update(stored_weight_bytes=2),
    "KV bytes of a layer": lambda p: p["profile"]["units"][1].update(kv_bytes_per_token=2),
    "shapes of a layer": lambda p: p["profile"]["units"][1].update(shapes_sha256="0" * 64),
    "hidden size": lambda p: p["profile"]["model"].update(hidden_size=8),
}


@pytest.mark.parametrize("case", ALTERED)
def test_a_plan_whose_claims_were_altered_to_fit_is_refused(
    run_command: Run, shipped: Path, plan_file: Path, tmp_path: Path, case: str
) -> None:
    from planner.model.profile import build_profile
    from plans.memory import stage_memory
    from plans.plan import Plan

    document = json.loads(plan_file.read_text())
    ALTERED[case](document)
    # Make the altered plan agree with itself, as somebody would who edits it on purpose.
    plan = Plan.model_validate_json(json.dumps(document))
    stages = []
    for stage in plan.stages:
        memory = stage_memory(
            plan.profile,
            workload=plan.workload,
            stage=stage.range,
            overhead_bytes=stage.overhead_bytes,
        )
        fields = ("weight_bytes", "kv_cache_bytes", "activation_bytes")
        stages.append(stage.model_copy(update={name: getattr(memory, name) for name in fields}))
    share = max(stage.total_bytes / stage.budget_bytes for stage in stages)
    prediction = plan.prediction.model_copy(update={"max_memory_share": share})
    plan_file.write_text(plan.model_copy(update={"stages": tuple(stages), "prediction": prediction}).to_json())
    done = run_command("llamaplan", "export", plan_file, "--model", shipped, "-o", tmp_path / "out")
    assert done.code == 5, done.err
    assert "solve again" in done.err
    assert build_profile is not None


def test_a_plan_made_from_a_bare_configuration_is_completed(run_command: Run, shipped: Path, tmp_path: Path) -> None:
    bare = tmp_path / "config.json"
    shutil.copy(shipped / "config.json", bare)
    plan = make_plan(bare, [3, 4])
    assert plan.profile.model.source == "config"
    (tmp_path / "plan.json").write_text(plan.to_json())
    done = run_command("llamaplan", "export", tmp_path / "plan.json", "--model", shipped, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert written["profile"]["model"]["source"] == "headers"
    assert len(written["profile"]["model"]["shards"]) == 4
    refused = run_command("llamaplan", "export", tmp_path / "plan.json", "--model", bare, "-o", tmp_path / "no")
    assert refused.code == 3
    assert "only a configuration" in refused.err


def test_verify_tells_which_tensor_differs_from_the_model(
    run_command: Run, models: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(models(), model)
    (tmp_path / "plan.json").write_text(make_plan(model, [2, 3]).to_json())
    assert run_command("llamaplan", "export", tmp_path / "plan.json", "--model", model, "-o", tmp_path / "o").code == 0
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = run_command("llamaplan", "verify", tmp_path / "o", "--model", model)
    assert done.code == 5
    assert "model.norm.weight differs from the model's at element 31 of 32" in done.err
    other = run_command("llamaplan", "verify", tmp_path / "o", "--model", models(intermediate_size=64))
    assert other.code == 5
    assert "another model" in other.err


@pytest.mark.row("C25")
def test_bad_values_are_named_on_request(run_command: Run, models: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(models(), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 3] = float("nan")
    tensors["model.layers.1.mlp.up_proj.weight"][1, 3] = float("-inf")
    tensors["model.layers.2.mlp.down_proj.weight"].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert find_bad_values(open_origin(model)) == {
        "model.layers.1.mlp.up_proj.weight": "holds 2 NaN or infinite values of 1536",
        "model.layers.2.mlp.down_proj.weight": "holds nothing but zeros",
    }
    (tmp_path / "plan.json").write_text(make_plan(model, [2, 3]).to_json())
    arguments = ["export", tmp_path / "plan.json", "--model", model, "-o"]
    done = run_command("llamaplan", *arguments, tmp_path / "out", "--check-values")
    assert done.code == 0
    assert "warning: model.layers.1.mlp.up_proj.weight holds 2 NaN" in done.err
    assert "NaN" not in run_command("llamaplan", *arguments, tmp_path / "silent").err
    assert torch.isnan(load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")[
        "model.layers.1.mlp.up_proj.weight"]).any()  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_largest_finite_value_is_not_called_infinite(
    tmp_path: Path, models: Callable[..., Path], dtype: str
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(models(dtype=dtype), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.finfo(getattr(torch, dtype)).max)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert find_bad_values(open_origin(model)) == {}


def test_emit_writes_to_stdout_or_a_file(run_command: Run, plan_file: Path, tmp_path: Path) -> None:
    printed = run_command("llamaplan", "emit", plan_file, "--for", "vllm", "--directory", "shards")
    assert printed.code == 0
    assert "VLLM_PP_LAYER_PARTITION=3,2,2" in printed.out
    assert "warning: vllm: the chain leaves a host" in printed.err
    path = tmp_path / "serve.sh"
    written = run_command("llamaplan", "emit", plan_file, "--for", "vllm", "--directory", "shards", "-o", path)
    assert written.code == 0
    assert written.out == ""
    assert path.read_text() == printed.out
    assert f"next: sh {path}" in written.err
    launches = tmp_path / "launch"
    assert run_command("llamaplan", "emit", plan_file, "--for", "torchrun", "-o", launches).code == 0
    assert names(launches) == ["launch-a.sh", "launch-b.sh"]
    document = json.loads(run_command("llamaplan", "emit", plan_file, "--for", "vllm", "--json").out)
    assert document["partition"] == "vllm:3,2,2"
    assert run_command("llamaplan", "emit", plan_file, "--for", "nothing").code == 2


def test_a_progress_bar_appears_on_a_terminal_only(shipped: Path, plan_file: Path, tmp_path: Path) -> None:
    code = "from planner.cli import main; main()"
    command = [sys.executable, "-c", code, "export", str(plan_file), "--model", str(shipped), "-o"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80"}
    controller, terminal = pty.openpty()
    done = subprocess.run(
        [*command, str(tmp_path / "one")], env=environment, stdout=subprocess.PIPE, stderr=terminal, check=True
    )
    os.close(terminal)
    seen = os.read(controller, 1 << 16)
    os.close(controller)
    assert b"export" in seen
    assert b"\x1b[" in seen
    assert b"\x1b" not in done.stdout
    plain = subprocess.run([*command, str(tmp_path / "two")], env=environment, capture_output=True, check=True)
    assert b"\x1b" not in plain.stderr


OTHERS = {
    "another family": (
        {"model_type": "starcoder2"},
        True,
        r"^llamaplan emit .*plan\.json --for vllm --directory",
    ),
    "no tokenizer": ({}, False, r"llamarun bench .*out \(there is no tokenizer"),
    "quantised": ({"quantization": "fp8"}, True, r"--for vllm --directory .*does not run fp8 weights"),
    "runs": ({}, True, r"llamarun generate .*out -p"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_next_step_after_an_export_is_one_that_works(shipped: Path, tmp_path: Path, case: str) -> None:
    from planner.cli.next_steps import after_export

    changes, has_tokenizer, says = OTHERS[case]
    plan = make_plan(shipped, [3, 4], hosts=["here", "here"])
    identity = plan.profile.model.model_copy(update=changes)
    plan = plan.model_copy(update={"profile": plan.profile.model_copy(update={"model": identity})})
    out = tmp_path / "out"
    out.mkdir()
    if has_tokenizer:
        (out / "tokenizer.json").touch()
    assert re.search(says, after_export(plan, out))
    on_cpu = make_plan(shipped, [3, 4], devices=["cuda:0", "cpu"], hosts=["here", "here"])
    on_cpu = on_cpu.model_copy(update={"profile": plan.profile})
    if case not in ("runs", "no tokenizer"):
        assert "--for transformers --directory" in after_export(on_cpu, out)


def test_a_next_step_never_names_a_path_that_a_command_takes_for_an_option(
    run_command: Run, shipped: Path, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_command("llamaplan", "export", plan_file, "--model", shipped, "-o", "./-out")
    assert done.err == "next: llamarun generate ./-out -p 'Once upon a time'\n"
    assert run_command("llamaplan", "verify", "./-out").err == done.err
    written = run_command("llamaplan", "emit", plan_file, "--for", "vllm", "-o", "./-serve.sh", "--directory", "./-out")
    assert "next: sh ./-serve.sh" in written.err
