"""Programs that others wrote as clients of OpenAI's API get the numbers that they get elsewhere.

lm-evaluation-harness needs `pip install 'lm-eval[api]'`. vLLM's benchmark is opt-in, from an environment of its own
(see `tests/exporter/emit/test_real_engines.py`):

    LLAMAPLAN_VLLM=/path/to/env/bin pytest tests/runtime/serve/test_peer_clients.py
"""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import Server
from transformers import AutoTokenizer

VLLM = os.environ.get("LLAMAPLAN_VLLM")
ENVIRONMENT = {**os.environ, "VLLM_TARGET_DEVICE": "cpu"}

# The last one has an empty beginning: its first token follows the token that begins texts.
PAIRS = [
    ("import os\nimport ", "sys\n"),
    ("def __init__(self, ", "name):"),
    ("for i in range(", ")10"),
    ("x =", " 1"),
    ("", "import os"),
]
TEXTS = ["def main(argv):\n    return 0\n", "class A:\n"]
GENERATED: list[tuple[str, dict[str, Any]]] = [
    ("import os", {"until": ["class"], "max_gen_toks": 16, "do_sample": False}),
    ("def parse(text):\n", {"until": ["\n\n", "return"], "max_gen_toks": 24, "do_sample": False}),
]


@pytest.mark.parametrize("settings", [{}, {"batch_size": 3}, {"num_concurrent": 4}], ids=["one", "lists", "many"])
def test_lm_eval_gives_what_it_gives_on_the_unsplit_model(
    server: Server, shipped: Path, shipped_reference: Callable[[torch.dtype], Any], settings: dict[str, int]
) -> None:
    pytest.importorskip("tenacity")
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    remote = completions.LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{server.port}/v1/completions",
        model="python-llama",
        tokenizer=str(shipped),
        max_length=512,
        **settings,
    )
    local = huggingface.HFLM(
        pretrained=shipped_reference(torch.bfloat16),
        tokenizer=AutoTokenizer.from_pretrained(shipped),
        batch_size=1,  # a row beside others is padded, which moves its sums
        device="cpu",
        add_bos_token=False,  # the API's default
        softmax_dtype="float32",
        max_length=511,  # the API keeps one token for itself
    )
    found, expected = _answers(remote), _answers(local)
    # Tokens' likelihoods are equal to the bit; of several, the harness adds one side's in float32, ours in float64.
    assert [is_greedy for _, is_greedy in found["pairs"]] == [is_greedy for _, is_greedy in expected["pairs"]]
    assert [x for x, _ in found["pairs"]] == pytest.approx([x for x, _ in expected["pairs"]], rel=1e-6)
    assert found["pairs"][3] == expected["pairs"][3]
    assert found["rolling"] == pytest.approx(expected["rolling"], rel=1e-6)
    assert found["texts"] == expected["texts"]


def _answers(harness: Any) -> dict[str, Any]:
    from lm_eval.api.instance import Instance

    def ask(kind: str, requests: Sequence[tuple[Any, ...]]) -> Any:
        return getattr(harness, kind)([Instance(kind, {}, request, i) for i, request in enumerate(requests)])

    return {
        "pairs": ask("loglikelihood", PAIRS),
        "rolling": ask("loglikelihood_rolling", [(text,) for text in TEXTS]),
        "texts": ask("generate_until", GENERATED),
    }


@pytest.mark.skipif(not VLLM, reason="opt-in: LLAMAPLAN_VLLM")
@pytest.mark.timeout(600)  # it imports for half a minute
@pytest.mark.parametrize(
    ("backend", "path"),
    [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")],
    ids=["completions", "chat"],
)
def test_vllm_bench_loses_no_request_and_counts_the_same_tokens(
    server: Server, shipped: Path, tmp_path: Path, backend: str, path: str
) -> None:
    names = ["prompt_tokens_total", "generation_tokens_total"]
    before = [server.metric(name) for name in names]
    asked = {"num-prompts": 24, "max-concurrency": 8, "random-input-len": 64, "random-output-len": 16, "seed": 1}
    command = [
        *[f"{VLLM}/vllm", "bench", "serve", "--backend", backend, "--endpoint", path],
        *["--base-url", f"http://127.0.0.1:{server.port}", "--model", "python-llama", "--tokenizer", shipped],
        *["--dataset-name", "random", "--ignore-eos", "--save-result", "--result-filename", tmp_path / "found.json"],
        *[word for name, value in asked.items() for word in (f"--{name}", value)],
    ]
    subprocess.run([str(word) for word in command], check=True, env=ENVIRONMENT, cwd=tmp_path, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())
    counted = [server.metric(name) - count for name, count in zip(names, before, strict=True)]
    assert (found["completed"], found["failed"]) == (24, 0)
    assert [found["total_input_tokens"], found["total_output_tokens"]] == counted
    assert counted[1] == 24 * 16
