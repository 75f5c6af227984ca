"""Plans in the words of other engines: each string obeys that engine's own rules and reads back to the same layers."""

import itertools
import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from export_helpers import make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import export
from exporter.emit import Emission, emit
from plans.cuts import layer_ranges
from plans.engines.spelling import COUNT_ENGINES, ENGINES, MAP_ENGINES, llama_cpp_ranges, parse_partition
from plans.errors import UsageError
from plans.plan import Plan
from tests.runtime.distributed.nursery import the_nursery

CUTS = [[7], [3, 4], [2, 3, 2], [1, 1, 1, 1, 1, 1, 1], [0, 7], [7, 0], [0, 3, 4, 0]]
ONE_HOST = ["here"] * 7


def non_empty(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(start, end) for start, end in ranges if end > start]


def planned(plan: Plan) -> list[tuple[int, int]]:
    return [(stage.start_layer, stage.end_layer) for stage in plan.stages]


def text_of(emission: Emission) -> str:
    (text,) = emission.files.values()
    return text


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("engine", [*COUNT_ENGINES, "llama.cpp", *MAP_ENGINES])
def test_every_emitted_string_reads_back_to_the_plans_layers(shipped: Path, engine: str, cut: list[int]) -> None:
    plan = make_plan(shipped, cut, hosts=ONE_HOST)
    if engine in COUNT_ENGINES and 0 in cut:
        with pytest.raises(UsageError, match="holds no layer"):
            emit(plan, engine=engine)
        return
    found = parse_partition(emit(plan, engine=engine).partition, num_layers=7)
    assert found.engine == engine
    if engine in COUNT_ENGINES:
        assert list(found.ranges) == planned(plan)
    else:
        assert non_empty(found.ranges) == non_empty(planned(plan))
    if found.devices is not None:
        used = [i for i, layers in enumerate(cut) if layers]
        assert found.devices == tuple(map(str, used))


@pytest.mark.parametrize("cut", [[3, 4], [2, 3, 2], [0, 4, 3]], ids=str)
def test_a_cpu_stage_that_comes_first_is_llama_cpps_cpu_part(shipped: Path, cut: list[int]) -> None:
    plan = make_plan(shipped, cut, devices=["cpu", "cuda:0", "cuda:1"][: len(cut)], hosts=ONE_HOST)
    found = parse_partition(emit(plan, engine="llama.cpp").partition, num_layers=7)
    assert found.has_cpu_part == (cut[0] > 0)
    assert non_empty(found.ranges) == non_empty(planned(plan))
    assert f"-ngl {7 + 1 - cut[0]} " in text_of(emit(plan, engine="llama.cpp"))


def test_two_hosts_are_in_the_plans_order_under_ray(shipped: Path) -> None:
    found = emit(make_plan(shipped, [2, 3, 2], hosts=["a", "b", "b"]), engine="vllm")
    assert found.not_expressed == ()
    text = text_of(found)
    assert text.index("a: CUDA_VISIBLE_DEVICES=0 ray start --head") < text.index("b: CUDA_VISIBLE_DEVICES=1,2 ray")


@pytest.mark.parametrize("devices", [["cuda:0", "cpu"], ["cuda:0", "cpu", "cuda:1"]], ids=str)
def test_llama_cpp_refuses_a_cpu_stage_anywhere_else(shipped: Path, devices: list[str]) -> None:
    plan = make_plan(shipped, [3, 4] if len(devices) == 2 else [2, 3, 2], devices=devices, hosts=ONE_HOST)
    with pytest.raises(UsageError, match="first layers on the CPU"):
        emit(plan, engine="llama.cpp")


@pytest.mark.parametrize("engine", COUNT_ENGINES)
def test_the_counts_are_what_the_engine_itself_would_accept(shipped: Path, engine: str) -> None:
    plan = make_plan(shipped, [2, 3, 2], hosts=ONE_HOST)
    text = text_of(emit(plan, engine=engine))
    size = re.search(r"--(?:pipeline-parallel-size|pp-size|pp_size) (\d+)", text)
    written = re.search(r"(?:_PP_LAYER_PARTITION=|pp_partition: \[)([\d, ]+)", text)
    assert size is not None
    assert written is not None
    # The engines split at commas, take integers, and compare the count with the ranks and the sum with the layers.
    counts = [int(part) for part in written[1].split(",")]
    assert len(counts) == int(size[1])
    assert sum(counts) == 7


FACTS = {"22 layers, 4 ranks": ("5,6,5,6", 22), "20 layers, 4 ranks": ("4,6,6,4", 20)}


@pytest.mark.parametrize("case", FACTS)
def test_published_partitions_are_read(case: str) -> None:
    counts, num_layers = FACTS[case]
    found = parse_partition(f"vllm:{counts}", num_layers=num_layers)
    assert found.layers == tuple(map(int, counts.split(",")))
    assert found.ranges[0][0] == 0
    assert found.ranges[-1][1] == num_layers


@pytest.mark.parametrize(
    "text",
    [
        "",
        "vllm",
        "vllm:",
        "vllm:5,6",
        "vllm:5,6,5,5",
        "vllm:5,,6,11",
        "vllm:5,6,5,6,",
        "vllm:-1,23",
        "vllm:5.0,17",
        "vllm: 22",
        "vllm:٢٢",
        "megatron:22",
        "5,6,5,6",
        "llama.cpp:",
        "llama.cpp:0,0",
        "llama.cpp:1,-1",
        "llama.cpp:1/ngl=",
        "llama.cpp:nan",
        "vllm:" + "0," * 5000 + "22",
        "accelerate:{}",
        'accelerate:{"model.layers.0": 0}',
        'accelerate:["a"]',
        'accelerate:{"": [1]}',
        "torchrun:22",
    ],
)
def test_what_is_no_partition_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_partition(text, num_layers=22)


@settings(deadline=None, max_examples=200)
@given(
    split=st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any),
    num_layers=st.integers(1, 60),
    ngl=st.integers(0, 99),
)
def test_llama_cpp_ranges_agree_with_its_arithmetic_in_single_precision(
    split: list[int], num_layers: int, ngl: int
) -> None:
    import numpy as np

    first = max(num_layers + 1 - ngl, 0)
    count = min(ngl, num_layers + 1)
    sums = np.cumsum(np.array(split, dtype=np.float32), dtype=np.float32)
    shares = sums / sums[-1]
    owner = [-1 if i < first else int(np.searchsorted(shares, np.float32(i - first) / np.float32(count), side="right"))
             for i in range(num_layers)]  # fmt: skip
    expected = layer_ranges([owner.count(gpu) for gpu in range(-1, len(split))])
    assert llama_cpp_ranges([Fraction(part) for part in split], num_gpu_layers=ngl, num_layers=num_layers) == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_shell_scripts_parse_and_python_compiles(shipped: Path, engine: str) -> None:
    directory = "my shards; $(touch evil) 'x'"
    for hosts in (ONE_HOST, ["a", "b", "c"]) if engine in (*COUNT_ENGINES, "torchrun") else (ONE_HOST,):
        plan = make_plan(shipped, [2, 3, 2], hosts=hosts)
        for name, text in emit(plan, engine=engine, directory=directory).files.items():
            if name.endswith(".sh"):
                done = subprocess.run(["sh", "-n"], input=text, text=True, capture_output=True, check=False)
                assert done.returncode == 0, done.stderr
                assert re.search(r"'my shards; \$\(touch evil\) ", text)
            elif name.endswith(".py"):
                compile(text, name, "exec")
                assert repr(directory) in text
            else:
                json.loads(text)


def run_script(text: str, folder: Path, *, program: str, arguments: Sequence[str] = ()) -> list[str]:
    """Run a script with `program` replaced by one that prints its environment and arguments."""
    fake = folder / program
    fake.write_text(
        '#!/bin/sh\nenv | grep -E "CUDA_VISIBLE|_PP_LAYER" | sort\nprintf "%s\\n" "$@"\n'
        'for last; do :; done\ncase "$last" in /*) cat "$last" ;; esac\n'
    )
    fake.chmod(0o755)
    done = subprocess.run(
        ["sh", "-s", "--", *arguments],
        input=text,
        text=True,
        capture_output=True,
        check=True,
        cwd=folder,
        env={"PATH": f"{folder}:{os.environ['PATH']}", "LLAMARUN_KEY_FILE": "key"},
    )
    return done.stdout.splitlines()


def test_the_scripts_hand_over_partition_devices_and_workload(shipped: Path, tmp_path: Path) -> None:
    plan = make_plan(shipped, [2, 3, 2], devices=["cuda:2", "cuda:0", "cuda:1"], hosts=ONE_HOST)
    said = run_script(text_of(emit(plan, engine="vllm", directory="d")), tmp_path, program="vllm")
    assert said[:4] == ["CUDA_VISIBLE_DEVICES=2,0,1", "VLLM_PP_LAYER_PARTITION=2,3,2", "serve", "d"]
    assert said[said.index("--max-model-len") + 1] == "64"
    said = run_script(text_of(emit(plan, engine="sglang", directory="d")), tmp_path, program="python3")
    assert said[:2] == ["CUDA_VISIBLE_DEVICES=2,0,1", "SGLANG_PP_LAYER_PARTITION=2,3,2"]
    said = run_script(text_of(emit(plan, engine="tensorrt-llm", directory="d")), tmp_path, program="trtllm-serve")
    assert said[0] == "CUDA_VISIBLE_DEVICES=2,0,1"
    assert said[-1] == "pp_partition: [2, 3, 2]"
    (tmp_path / "d.gguf").touch()
    said = run_script(text_of(emit(plan, engine="llama.cpp", directory="d")), tmp_path, program="llama-server")
    assert said[said.index("--tensor-split") + 1] == "2,3,3"
    assert said[said.index("-ngl") + 1] == "8"


def test_several_hosts_get_a_rank_each(shipped: Path, tmp_path: Path) -> None:
    plan = make_plan(shipped, [2, 3, 1, 1], devices=["a0", "a1", "b0", "b1"], hosts=["a", "a", "b", "b"])
    text = text_of(emit(plan, engine="sglang", directory="d"))
    said = run_script(text, tmp_path, program="python3", arguments=["b"])
    assert said[0] == "CUDA_VISIBLE_DEVICES=0,1"
    assert said[said.index("--node-rank") + 1] == "1"
    assert said[said.index("--dist-init-addr") + 1] == "a:5000"
    launches = emit(plan, engine="torchrun", directory="d").files
    assert sorted(launches) == ["launch-a.sh", "launch-b.sh"]
    said = run_script(launches["launch-b.sh"], tmp_path, program="torchrun", arguments=["--more"])
    pairs = dict(itertools.pairwise(said))
    assert (pairs["--nnodes"], pairs["--node-rank"], pairs["--nproc-per-node"]) == ("2", "1", "2")
    assert said[said.index("runtime.worker") :] == [
        *["runtime.worker", "d", "--more", "--listen", "a:29501", "--key-file", "key", "--trusted-network"],
        *["--device-map", "2=cuda:0", "--device-map", "3=cuda:1"],
    ]


NOT_EXPRESSED: dict[str, tuple[list[str], list[str], str, str]] = {
    "a chain that comes back": (["a0", "b0", "a1"], ["a", "b", "a"], "vllm", "comes back to it"),
    "host order under Ray": (["a0", "b0", "c0"], ["a", "b", "c"], "vllm", "orders the others itself"),
    "CPU compute in accelerate": (["cuda:0", "cuda:1", "cpu"], ONE_HOST, "accelerate", r"stages \[2\]"),
    "the embedding in llama.cpp": (["cuda:0", "cuda:1", "cuda:2"], ONE_HOST, "llama.cpp", "embedding"),
    "a chain that comes back, ours": (["a0", "b0", "a1"], ["a", "b", "a"], "torchrun", "comes back to it"),
}


@pytest.mark.parametrize("case", NOT_EXPRESSED)
def test_what_an_engine_cannot_express_is_said_in_the_file_too(shipped: Path, case: str) -> None:
    devices, hosts, engine, says = NOT_EXPRESSED[case]
    found = emit(make_plan(shipped, [2, 3, 2], devices=devices, hosts=hosts), engine=engine)
    assert any(re.search(says, text) for text in found.not_expressed)
    if engine != "accelerate":  # JSON has no comments
        for text in found.files.values():
            assert all(f"# NOT EXPRESSED: {limit}" in text for limit in found.not_expressed)


@pytest.mark.parametrize("engine", [*MAP_ENGINES, "llama.cpp"])
def test_engines_of_one_machine_refuse_a_plan_for_several(shipped: Path, engine: str) -> None:
    with pytest.raises(UsageError, match=r"spans 2 hosts \(a, b\)"):
        emit(make_plan(shipped, [3, 4], hosts=["a", "b"]), engine=engine)


def test_a_plain_plan_loses_nothing(shipped: Path) -> None:
    plan = make_plan(shipped, [2, 3, 2], hosts=ONE_HOST)
    for engine in set(ENGINES) - {"llama.cpp"}:
        assert emit(plan, engine=engine).not_expressed == ()


def test_an_unknown_engine_is_refused(shipped: Path) -> None:
    with pytest.raises(UsageError, match="deepspeed"):
        emit(make_plan(shipped, [7]), engine="deepspeed")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_accelerate_takes_the_device_map_and_gives_the_same_logits(
    models: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    accelerate = pytest.importorskip("accelerate")
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = models(tie_word_embeddings=tied)
    plan = make_plan(model, [2, 1, 2], devices=["cpu#0", "cpu#1", "cpu#2"], hosts=ONE_HOST)
    export(plan, model=model, output=tmp_path / "out")
    placed = json.loads(text_of(emit(plan, engine="accelerate")))
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model).eval()(input_ids=ids).logits
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=placed).eval()
        assert loaded(input_ids=ids).logits.equal(expected)
        accelerate.utils.check_device_map(loaded, placed)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        dispatched = accelerate.dispatch_model(plain, device_map=placed, main_device="cpu", force_hooks=True)
        assert dispatched(input_ids=ids).logits.equal(expected)


def test_a_device_map_with_unlike_devices_is_walked_by_accelerate(models: Callable[..., Path], tmp_path: Path) -> None:
    """Without GPUs here, the disk stands in for the second device: weights are fetched from it at every step."""
    pytest.importorskip("accelerate")
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = models()
    plan = make_plan(model, [2, 3], hosts=ONE_HOST)
    export(plan, model=model, output=tmp_path / "out")
    placed = json.loads(text_of(emit(plan, engine="accelerate")))
    stand_in = {name: {0: "cpu", 1: "disk"}[device] for name, device in placed.items()}
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model).eval()(input_ids=ids).logits
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", device_map=stand_in, offload_folder=tmp_path / "offload"
        ).eval()
        assert loaded(input_ids=ids).logits.equal(expected)


def test_the_transformers_snippet_runs(shipped: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    plan = make_plan(shipped, [3, 4], devices=["cpu#0", "cpu#1"], hosts=ONE_HOST)
    export(plan, model=shipped, output=tmp_path / "out")
    script = tmp_path / "run.py"
    script.write_text(text_of(emit(plan, engine="transformers", directory=str(tmp_path / "out"))))
    done = the_nursery().start(["python", script], output=tmp_path / "said")
    assert done.end(within=240)[0] == 0, done.said
    assert "Once upon a time" in done.text
