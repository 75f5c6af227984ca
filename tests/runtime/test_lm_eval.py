"""lm-evaluation-harness on a chain gives what it gives on the unsplit model; needs `pip install lm-eval`."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from plans.stages import StageRange
from runtime import load

huggingface = pytest.importorskip("lm_eval.models.huggingface")

CUT = (
    StageRange("cpu", 0, 3, has_embedding=True, has_head=False),
    StageRange("cpu", 3, 7, has_embedding=False, has_head=True),
)
REQUESTS: dict[str, list[tuple[Any, ...]]] = {
    "loglikelihood": [("import os\nimport ", "sys\n"), ("def __init__(self, ", "name):"), ("for i in range(", ")10")],
    "loglikelihood_rolling": [("def main(argv):\n    return 0\n",)],
    "generate_until": [("import os", {"until": ["class"], "max_gen_toks": 16, "do_sample": False})],
}


def answers(model: Any, shipped: Path) -> dict[str, Any]:
    from lm_eval.api.instance import Instance

    harness = huggingface.HFLM(
        pretrained=model, tokenizer=AutoTokenizer.from_pretrained(shipped), batch_size=2, device="cpu"
    )
    return {
        kind: getattr(harness, kind)([Instance(kind, {}, arguments, i) for i, arguments in enumerate(requests)])
        for kind, requests in REQUESTS.items()
    }


def test_the_harness_gives_the_same_answers_on_a_chain(shipped: Path) -> None:
    unsplit = AutoModelForCausalLM.from_pretrained(shipped).eval()
    assert answers(load(shipped, stages=CUT), shipped) == answers(unsplit, shipped)
