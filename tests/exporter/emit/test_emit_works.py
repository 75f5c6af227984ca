"""Emitted files that work: any spelling of the folder, tied heads, shares of memory, plans that an engine refuses."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from export_helpers import make_plan

from exporter import export
from exporter.emit import emit
from plans.engines.spelling import COUNT_ENGINES, ENGINES
from plans.errors import UsageError
from plans.plan import Plan
from plans.reading.sizes import format_bytes
from tests.conftest import RunCommand

GIB = 1 << 30


def text_of(plan: Plan, engine: str, directory: str = "d") -> str:
    (text,) = emit(plan, engine=engine, directory=directory).files.values()
    return text


@pytest.mark.row("P5")
@pytest.mark.parametrize("stand_in", [("cpu", "disk"), ("disk", "cpu")], ids=" ".join)
def test_a_tied_model_cut_over_two_devices_loads_by_the_map(
    models: Callable[..., Path], tmp_path: Path, stand_in: tuple[str, str]
) -> None:
    """Without GPUs here, the disk stands in for one of the devices."""
    pytest.importorskip("accelerate")
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = models(tie_word_embeddings=True)
    plan = make_plan(model, [2, 3], hosts=["here", "here"])
    export(plan, model=model, output=tmp_path / "out")
    found = emit(plan, engine="accelerate")
    assert any("tied to the embedding and planned for cuda:1" in text for text in found.not_expressed)
    placed = {name: stand_in[device] for name, device in json.loads(text_of(plan, "accelerate")).items()}
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model).eval()(input_ids=ids).logits
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", device_map=placed, offload_folder=tmp_path / "offload"
        ).eval()
        assert loaded(input_ids=ids).logits.equal(expected)


def test_an_untied_head_stays_where_it_is_planned(shipped: Path, models: Callable[..., Path]) -> None:
    plan = make_plan(models(), [2, 3], hosts=["here", "here"])
    assert json.loads(text_of(plan, "accelerate"))["lm_head"] == 1
    assert emit(plan, engine="accelerate").not_expressed == ()


FOLDERS = {
    "d": "d.gguf",
    "d/": "d.gguf",
    "d//": "d.gguf",
    "./d": "./d.gguf",
    "deep/er": "deep/er.gguf",
    "-d": "./-d.gguf",
    "--help/": "./--help.gguf",
    ".": "./model.gguf",
    "./": "./model.gguf",
    "deep/..": "deep/../model.gguf",
    "my shards; $(touch evil) `touch evil`/": "my shards; $(touch evil) `touch evil`.gguf",
    'it\'s "it"': 'it\'s "it".gguf',
    "{x}\\$HOME\n*~": "{x}\\$HOME\n*~.gguf",
    "größe": "größe.gguf",
}


@pytest.mark.row("P9")
@pytest.mark.parametrize("directory", [*FOLDERS, "/absolute"])
def test_llama_cpp_converts_and_serves_any_folder(shipped: Path, tmp_path: Path, directory: str) -> None:
    gguf = FOLDERS.get(directory, f"{tmp_path}/absolute.gguf")
    directory = directory.replace("/absolute", f"{tmp_path}/absolute/")
    home = tmp_path / "home"
    (home / directory).mkdir(parents=True, exist_ok=True)
    (home / "deep").mkdir(parents=True, exist_ok=True)
    programs = tmp_path / "programs"
    programs.mkdir()
    # The converter is given a folder that is there and makes the file; a second run finds the file.
    (programs / "python3").write_text('#!/bin/sh\ntest -d "$2" && test "${2#-}" = "$2" && touch "$6"\n')
    (programs / "llama-server").write_text('#!/bin/sh\ntest -f "$2" && printf "%s" "$2"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    script = text_of(make_plan(shipped, [3, 4], hosts=["here", "here"]), "llama.cpp", directory)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}"}
    for llama_cpp in ({"LLAMA_CPP": "src"}, {}):
        done = subprocess.run(
            ["sh"], input=script, cwd=home, env=environment | llama_cpp, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == gguf
    assert not list(tmp_path.rglob("evil"))
    assert not list(home.rglob("*.gguf.*"))


@pytest.mark.row("P9")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("directory", FOLDERS)
def test_no_engine_takes_a_folder_for_an_option(shipped: Path, engine: str, directory: str) -> None:
    plan = make_plan(shipped, [3, 4], hosts=["here", "here"])
    for name, text in emit(plan, engine=engine, directory=directory).files.items():
        if name.endswith(".sh"):
            printed = subprocess.run(
                ["sh", "-c", 'eval "set -- $1"; printf "%s\\n" "$1"', "sh", word_of(text)],
                capture_output=True,
                text=True,
            )
            assert printed.stdout == f"./{directory}\n" if directory.startswith("-") else f"{directory}\n"


def word_of(script: str) -> str:
    """The folder as the script quotes it."""
    found = re.search(
        r"(?:vllm serve|--model-path|trtllm-serve|runtime\.worker|convert_hf_to_gguf\.py\" \\\n)\s*(.*?)"
        r"(?: \\\n| --outtype| \"\$@\")",
        script,
        flags=re.DOTALL,
    )
    assert found is not None
    return found[1]


@pytest.mark.row("P9")
@pytest.mark.parametrize("directory", ["", "\udcff"], ids=["empty", "not UTF-8"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_folder_without_a_usable_name_is_refused(shipped: Path, engine: str, directory: str) -> None:
    with pytest.raises(UsageError, match="--directory"):
        emit(make_plan(shipped, [7]), engine=engine, directory=directory)


REFUSED: dict[str, tuple[list[int], list[str], list[str], str, str]] = {
    "the embedding alone": ([0, 3, 4], ["g0", "g1", "g2"], ["a"] * 3, "embedding on g0", "0-3@g1,3-7@g2"),
    "the head alone": ([3, 4, 0], ["g0", "g1", "g2"], ["a"] * 3, "head on g2", "0-3@g0,3-7@g1"),
    "a CPU beside GPUs": ([2, 1, 4], ["g0", "cpu", "g1"], ["a"] * 3, r"planned for cpu \(cpu\)", "0-2@g0,2-7@g1"),
}


@pytest.mark.row("P9")
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("engine", COUNT_ENGINES)
def test_what_an_engine_cannot_run_is_refused_with_the_nearest_cut(shipped: Path, engine: str, case: str) -> None:
    cut, devices, hosts, says, nearest = REFUSED[case]
    with pytest.raises(UsageError, match=says) as caught:
        emit(make_plan(shipped, cut, devices=devices, hosts=hosts), engine=engine)
    found = re.search(r"--layers (\S+),", caught.value.hint)
    assert found is not None
    if case == "a CPU beside GPUs":
        moved = {"0-2@g0,2-7@g1", "0-3@g0,3-7@g1"}  # one layer either way
        assert found[1] in moved
        assert nearest in moved
    else:
        assert found[1] == nearest


@pytest.mark.row("P9")
@pytest.mark.parametrize("engine", ["sglang", "tensorrt-llm"])
def test_hosts_with_unlike_numbers_of_stages_are_refused_where_the_engine_wants_them_alike(
    shipped: Path, engine: str
) -> None:
    plan = make_plan(shipped, [3, 1, 3], devices=["a0", "a1", "b0"], hosts=["a", "a", "b"])
    with pytest.raises(UsageError, match="a 2, b 1") as caught:
        emit(plan, engine=engine)
    assert "--layers 0-3@a0,3-7@b0," in caught.value.hint or "--layers 0-4@a0,4-7@b0," in caught.value.hint
    emit(plan, engine="vllm")


@pytest.mark.row("P9")
def test_the_nearest_cut_solves_and_is_emitted(shipped: Path, run_command: RunCommand, tmp_path: Path) -> None:
    plan, offer = (
        tmp_path / "plan.json",
        ["--device", "2xrtx3060=2GiB", "--device", "cpu=2GiB", "-o", tmp_path / "plan.json"],
    )
    layers = "0-2@rtx3060#0,2-4@rtx3060#1,4-7@cpu"
    assert run_command("llamaplan", "solve", shipped, "--layers", layers, *offer).code == 0
    refused = run_command("llamaplan", "emit", plan, "--for", "vllm")
    assert refused.code == 2
    nearest = re.search(r"--layers (\S+),", refused.err)
    assert nearest is not None
    assert run_command("llamaplan", "solve", shipped, "--layers", nearest[1], *offer).code == 0
    assert run_command("llamaplan", "emit", plan, "--for", "vllm", "-o", tmp_path / "serve.sh").code == 0


@pytest.mark.row("P9")
def test_where_no_cut_fits_both_sizes_are_said(shipped: Path) -> None:
    plan = make_plan(shipped, [1, 6], devices=["g0", "cpu"], hosts=["a", "a"])
    small = plan.stages[0].total_bytes
    plan = with_memory(plan, [(small, small), (GIB, GIB)])
    with pytest.raises(UsageError) as caught:
        emit(plan, engine="vllm")
    assert format_bytes(small) in caught.value.hint
    assert "--for accelerate or transformers or torchrun" in caught.value.hint


def with_memory(plan: Plan, sizes: list[tuple[int, int]]) -> Plan:
    """The plan on devices with these memories and budgets."""
    devices = [
        device.model_copy(update={"memory_bytes": memory, "budget_bytes": budget})
        for device, (memory, budget) in zip(plan.cluster.devices, sizes, strict=True)
    ]
    stages = [s.model_copy(update={"budget_bytes": b}) for s, (_, b) in zip(plan.stages, sizes, strict=True)]
    return plan.model_copy(
        update={"cluster": plan.cluster.model_copy(update={"devices": tuple(devices)}), "stages": tuple(stages)}
    )


OPTIONS = {
    "vllm": "--gpu-memory-utilization",
    "sglang": "--mem-fraction-static",
    "tensorrt-llm": "--kv_cache_free_gpu_memory_fraction",
}


def caches(plan: Plan, engine: str, share: Fraction) -> list[Fraction]:
    """Bytes of KV cache per stage when an engine is told `share`, by its own rule: the tightest rank counts for all."""
    stages, memory = plan.stages, [plan.cluster.device(stage.device).memory_bytes for stage in plan.stages]
    fixed = [stage.total_bytes - stage.kv_cache_bytes for stage in stages]
    if engine == "vllm":
        rooms = [share * m - f for m, f in zip(memory, fixed, strict=True)]
    elif engine == "tensorrt-llm":
        rooms = [share * (m - f) for m, f in zip(memory, fixed, strict=True)]
    else:
        free = [m - s.overhead_bytes for m, s in zip(memory, stages, strict=True)]
        left = min(f - s.weight_bytes for f, s in zip(free, stages, strict=True))
        rooms = [left - (1 - share) * min(free)] * len(stages)
    times = min(room / stage.kv_cache_bytes for room, stage in zip(rooms, stages, strict=True))
    return [times * stage.kv_cache_bytes for stage in stages]


MIB = 1 << 20
MEMORIES = {
    "alike": [(100 * MIB, 80 * MIB), (100 * MIB, 80 * MIB)],
    "tight": [(100 * MIB, 0), (100 * MIB, 0)],
    "unlike budgets": [(100 * MIB, 80 * MIB), (100 * MIB, 8 * MIB)],
    "unlike devices": [(400 * MIB, 300 * MIB), (20 * MIB, 18 * MIB)],
}


@pytest.mark.row("P9")
@pytest.mark.parametrize("sizes", MEMORIES)
@pytest.mark.parametrize("engine", COUNT_ENGINES)
def test_every_share_holds_the_planned_cache_and_no_budget_is_broken(shipped: Path, engine: str, sizes: str) -> None:
    plan = make_plan(shipped, [4, 3], hosts=["here", "here"])
    wanted = [(m, b or s.total_bytes) for (m, b), s in zip(MEMORIES[sizes], plan.stages, strict=True)]
    plan = with_memory(plan, wanted)
    written = re.search(rf"{OPTIONS[engine]} (\S+)", text_of(plan, engine))
    assert written is not None
    assert 0 < Fraction(written[1]) <= 1
    for stage, cache in zip(plan.stages, caches(plan, engine, Fraction(written[1])), strict=True):
        assert cache >= stage.kv_cache_bytes
        assert stage.total_bytes - stage.kv_cache_bytes + cache <= stage.budget_bytes + (sizes == "tight") * MIB


@pytest.mark.row("P9")
def test_vllm_is_said_to_ask_for_more_of_a_device_than_its_budget(shipped: Path) -> None:
    plan = with_memory(make_plan(shipped, [4, 3], hosts=["here", "here"]), MEMORIES["unlike devices"])
    assert any("of memory for all" in text for text in emit(plan, engine="vllm").not_expressed)


@pytest.mark.row("P9")
def test_a_plan_for_cpus_alone_is_one_for_vllms_build_for_cpus(shipped: Path) -> None:
    plan = make_plan(shipped, [2, 5], devices=["cpu#0", "cpu#1"], hosts=["here", "here"])
    text = text_of(plan, "vllm")
    assert "export VLLM_CPU_KVCACHE_SPACE=1\n" in text
    assert "--gpu-memory-utilization" not in text
    assert text.rstrip().endswith("--max-num-seqs 1")
    for engine in ("sglang", "tensorrt-llm"):
        with pytest.raises(UsageError, match="every stage is planned for a CPU"):
            emit(plan, engine=engine)
    apart = make_plan(shipped, [2, 5], devices=["cpu#0", "cpu#1"], hosts=["a", "b"])
    with pytest.raises(UsageError, match="on one machine"):
        emit(apart, engine="vllm")


@pytest.mark.row("P8")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_context_longer_than_the_models_is_refused_or_said_as_the_engine_does(shipped: Path, engine: str) -> None:
    plan = make_plan(shipped, [3, 4], hosts=["here", "here"])
    longest = plan.profile.model.max_position_embeddings
    plan = plan.model_copy(update={"workload": plan.workload.model_copy(update={"context_tokens": longest + 1})})
    if engine in {"vllm", "sglang", "torchrun"}:
        with pytest.raises(
            UsageError, match=f"{longest + 1} tokens are more than the model was trained for .{longest}."
        ) as caught:
            emit(plan, engine=engine)
        assert caught.value.hint == f"solve again with --ctx-size {longest}"
    else:
        assert any(
            f"more than the model was trained for ({longest})" in text
            for text in emit(plan, engine=engine).not_expressed
        )


@pytest.mark.row("P9")
@pytest.mark.parametrize("change", [{"model_type": "gemma3_text"}, {"quantization": "fp8"}], ids=str)
def test_no_script_starts_llamarun_on_a_model_it_does_not_run(shipped: Path, change: dict[str, str]) -> None:
    plan = make_plan(shipped, [4, 3], hosts=["here", "here"])
    model = plan.profile.model.model_copy(update=change)
    plan = plan.model_copy(update={"profile": plan.profile.model_copy(update={"model": model})})
    with pytest.raises(UsageError, match=r"llamarun, which does not run .*(gemma3_text|fp8)") as caught:
        emit(plan, engine="torchrun")
    assert "--for accelerate or transformers" in caught.value.hint
