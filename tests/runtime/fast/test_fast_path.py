"""The native kernels under a chain and under single stages: used where they serve, and nowhere else."""

import copy
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import CPU, as_stage, assert_same, model_step, stages_step, trace
from test_fast import distance, make_model
from transformers import AutoTokenizer, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from plans.checkpoint.folder import open_checkpoint
from plans.errors import UsageError
from plans.native.building import Unavailable
from plans.stages import StageRange
from runtime import load
from runtime import load as load_anything
from runtime.fast import model as fast_model
from runtime.fast.cache import FastLayer, adopt
from runtime.fast.choice import ROWS, choose, measure, recall
from runtime.fast.model import FastModel, Part
from runtime.fast.native import Library
from runtime.fast.setup import set_up
from runtime.fast.speed import Choice, Speed
from runtime.reading.tensors import FolderTensors, torch_dtype
from runtime.stages.chain import Chain
from runtime.stages.loading import set_speed
from runtime.stages.stage import Stage, build_stage
from tests.conftest import RunCommand

TEXTS = ("import os\n", "def __init__(self, ", "try:\n    import json\nexcept ", "for i in range(10):\n    ")
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 64, "min_new_tokens": 64, "pad_token_id": 0}
CUTS = {1: (0, 9), 2: (0, 4, 9), 4: (0, 2, 5, 8, 9)}
"""Edges between the nine units of the shipped checkpoint."""


def cut(edges: tuple[int, ...], *, num_layers: int = 7) -> tuple[StageRange, ...]:
    return tuple(as_stage(a, b, num_layers=num_layers) for a, b in pairwise(edges))


@pytest.fixture(scope="module")
def fast(shipped: Path) -> Callable[..., Chain]:
    """The shipped checkpoint on the kernels."""

    def make(*, dtype: str = "fp32", stages: int = 1) -> Chain:
        chain = load(shipped, stages=cut(CUTS[stages]), dtype=dtype, speed="max")
        assert chain.fast is not None
        return chain

    return make


def inputs_of(shipped: Path, *texts: str) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    return dict(tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one", "padded batch"])
def test_greedy_tokens_of_the_shipped_checkpoint_are_those_of_transformers(
    texts: tuple[str, ...], dtype: str, shipped: Path, fast: Callable[..., Chain], shipped_reference: Callable[..., Any]
) -> None:
    inputs = inputs_of(shipped, *texts)
    length = inputs["input_ids"].shape[1]
    expected = shipped_reference(torch_dtype(dtype)).generate(
        **inputs, **GREEDY, output_logits=True, return_dict_in_generate=True
    )
    found = fast(dtype=dtype).generate(**inputs, **GREEDY)
    assert dtype == "bf16" or torch.equal(found, expected.sequences)
    for row in range(len(texts)):
        parted = (found != expected.sequences)[row, length:].nonzero()
        if len(parted):  # where bfloat16 rounds the two best to (almost) the same logit
            logits, token = expected.logits[int(parted[0])][row].float(), found[row, length + int(parted[0])]
            assert logits.max() - logits[token] <= logits.max() * 2**-7  # two steps of bfloat16


@pytest.mark.parametrize("stages", [2, 4])
def test_a_cut_changes_no_bit_of_the_fast_path(stages: int, fast: Callable[..., Chain]) -> None:
    whole, parts = fast(dtype="bf16"), fast(dtype="bf16", stages=stages)
    assert_same(*(trace(model_step(chain), vocab_size=2048, num_tokens=8) for chain in (whole, parts)))


def test_every_mode_of_generate_gives_the_tokens_of_the_reference(shipped: Path, fast: Callable[..., Chain]) -> None:
    reference, chain = load(shipped, dtype="fp32"), fast(stages=2)
    inputs, single = inputs_of(shipped, *TEXTS[:2]), inputs_of(shipped, TEXTS[0])
    modes: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = [
        (inputs, {"do_sample": True, "temperature": 0.8}),
        (inputs, {"num_beams": 3, "do_sample": False}),
        (inputs, {"cache_implementation": "static", "do_sample": False}),
        (inputs, {"prefill_chunk_size": 3, "do_sample": False}),
        (single, {"prompt_lookup_num_tokens": 3, "do_sample": False}),
        (single, {"use_cache": False, "do_sample": False}),
    ]
    for given, mode in modes:
        tokens = []
        for model in (reference, chain):
            torch.manual_seed(0)
            tokens.append(model.generate(**given, **mode, max_new_tokens=12, pad_token_id=0))
        assert torch.equal(*tokens), mode


def test_calls_beyond_a_plain_step_get_what_transformers_gives(shipped: Path, fast: Callable[..., Chain]) -> None:
    reference, chain, ids = load(shipped, dtype="fp32"), fast(), torch.tensor([[5, 6, 7]])
    for options in ({"labels": ids}, {"output_hidden_states": True}, {"return_dict": False}, {"use_cache": False}):
        caches = [DynamicCache(), DynamicCache()]
        with torch.no_grad():
            found, expected = (
                m(ids, past_key_values=c, **options) for m, c in zip((chain, reference), caches, strict=True)
            )
        for a, b in zip(_values(found), _values(expected), strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b), options
    assert chain(ids, past_key_values=DynamicCache()).logits.requires_grad  # gradients were not switched off


def _values(outputs: Any) -> list[Any]:
    return list(outputs.values()) if hasattr(outputs, "values") else list(outputs)


@pytest.mark.parametrize("native_stages", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("name", ["llama", "granite", "mistral window", "qwen2 window", "smollm3"])
def test_stages_of_both_kinds_work_together(name: str, native_stages: tuple[int, ...], kernels: Library) -> None:
    model = make_model(name)
    num_layers = len(model.model.layers)
    stages = cut((0, 2, 3, num_layers + 2), num_layers=num_layers)
    fast = set_up(model, stages, [CPU] * 3, speed=Speed.MAX)
    assert isinstance(fast, FastModel)
    parts = [p if i in native_stages else Part(p.units, None, p.choice) for i, p in enumerate(fast._parts)]
    fast = FastModel(model, parts)
    caches, ids = [DynamicCache(config=model.config) for _ in range(2)], torch.randint(3, 100, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    adopt(caches[0], num_layers=num_layers)
    with torch.no_grad():
        for cache in caches:
            model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
        for step in range(3):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            new, positions = ids[:, step : step + 1], mask.sum(-1, keepdim=True) - 1
            found = fast.step(new, attention_mask=mask, position_ids=positions, cache=caches[0])
            expected = model(new, attention_mask=mask, position_ids=positions, past_key_values=caches[1]).logits
            assert found is not None
            assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("edges", [(0, 4, 9), (0, 1, 8, 9)], ids=["halves", "embedding, layers, head"])
def test_stages_that_know_nothing_of_each_other_are_fast_too(edges: tuple[int, ...], shipped: Path) -> None:
    config, tensors = _parts_of(shipped)
    results = []
    for speed in ("reference", "max"):
        stages = [
            build_stage(config, spec, tensors, dtype=torch.float32, device=CPU, speed=speed) for spec in cut(edges)
        ]
        results.append(trace(stages_step(stages), vocab_size=config.vocab_size, num_tokens=6))
    assert max(distance(a, b) for a, b in zip(*results, strict=True)) < 1e-5
    paths = [stage.path for stage in stages]
    assert paths == ["fast" if stage.has_layers or stage.spec.has_head else "reference" for stage in stages]
    assert all(type(layer) is FastLayer for layer in stages[1].new_cache().layers)


def _parts_of(folder: Path) -> tuple[PreTrainedConfig, FolderTensors]:
    from runtime.reading.families import parse_model_config

    checkpoint = open_checkpoint(folder)
    return parse_model_config(checkpoint.config.raw), FolderTensors(checkpoint)


def test_past_a_sliding_window_transformers_takes_over_and_drops_what_is_out_of_sight(
    kernels: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_model, "STEP_SLOTS", 8)
    model = make_model("mistral window")
    fast, cache, own = _fast(model), DynamicCache(config=model.config), DynamicCache(config=model.config)
    served = []
    with torch.no_grad():
        for token in range(3, 30):
            ids = torch.tensor([[token]])
            logits = fast.step(ids, attention_mask=None, position_ids=None, cache=cache)
            served.append(logits is not None)
            logits = model(ids, past_key_values=cache).logits if logits is None else logits
            assert distance(logits, model(ids, past_key_values=own).logits) < 1e-5
    assert served == [True] * (7 + 8) + [False] * (27 - 15)
    assert all(type(layer) is DynamicSlidingWindowLayer and layer.keys.shape[2] < 7 for layer in cache.layers)


def _fast(model: Any) -> FastModel:
    units = StageRange("cpu", 0, len(model.model.layers), has_embedding=True, has_head=True)
    fast = set_up(model, [units], [CPU], speed=Speed.MAX)
    assert isinstance(fast, FastModel)
    return fast


def test_a_converted_or_copied_chain_runs_without_the_kernels(shipped: Path, fast: Callable[..., Chain]) -> None:
    chain, inputs = fast(), inputs_of(shipped, TEXTS[0])
    twin = copy.deepcopy(chain)
    assert (twin.fast, twin.stage_path(0, num_rows=1), chain.stage_path(0, num_rows=1)) == (None, "reference", "fast")
    chain.to(torch.bfloat16)
    assert chain.fast is None
    expected = load(shipped, dtype="bf16").generate(**inputs, **GREEDY)
    assert torch.equal(chain.generate(**inputs, **GREEDY), expected)


# --- which path -----------------------------------------------------------------------------------------------------


def test_the_choice_covers_every_number_of_rows_and_ends_with_the_last() -> None:
    choice = Choice(((1, 2), (4, 1), (16, 0)))
    assert [choice.threads(num_rows=n) for n in (1, 2, 4, 5, 16, 17)] == [2, 1, 1, 0, 0, 0]
    assert not Choice(((1, 0),)).is_ever_fast


@pytest.mark.parametrize("edges", [(0, 9), (0, 8, 9)], ids=["layers", "head alone"])
def test_measuring_gives_a_thread_count_for_every_number_of_sequences_and_more_rows_go_layer_by_layer(
    edges: tuple[int, ...], shipped: Path, kernels: Library
) -> None:
    chain = load(shipped)
    choice = measure(chain, cut(edges)[-1], kernels)
    *steps, prompts = choice.threads_by_rows
    assert [rows for rows, _ in steps] == list(ROWS)
    assert {threads for _, threads in steps} <= {*range(1, torch.get_num_threads() + 1)}
    assert prompts == (ROWS[-1] + 1, 0)


def test_a_choice_is_measured_once_and_a_file_that_makes_no_sense_is_ignored(
    shipped: Path, kernels: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chain, said = load(shipped), list[str]()

    def run() -> Choice:
        return choose(chain, chain.stages[0], kernels, progress=said.append)

    first = run()
    assert run() == first
    assert len(said) == 1
    (file,) = (tmp_path / "llamaplan").glob("choice-*.json")
    text = file.read_text()
    for damaged in ("", text[:-9], text.replace('"threads": 1', '"threads": 9'), text.replace("bfloat16", "float32")):
        file.write_text(damaged)
        run()
    assert len(said) == 5
    assert recall(tmp_path / "nothing.json", None) is None  # type: ignore[arg-type]


def test_without_a_home_every_run_measures(
    shipped: Path, kernels: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llamaplan").mkdir()
    (tmp_path / "llamaplan").chmod(0o777)  # anybody could have written what lies there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chain, said = load(shipped), list[str]()
    for _ in range(2):
        choose(chain, chain.stages[0], kernels, progress=said.append)
    assert len(said) == 2
    assert list((tmp_path / "llamaplan").iterdir()) == []


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")


@pytest.mark.usefixtures("no_kernels")
def test_without_kernels_a_library_user_is_warned_and_gets_the_reference(shipped: Path) -> None:
    with pytest.warns(UserWarning, match="no C compiler"):
        chain = load_anything(shipped, speed="auto")
    assert chain.fast is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_anything(shipped)
    config, tensors = _parts_of(shipped)
    stage = build_stage(config, cut((0, 9))[0], tensors, dtype=torch.bfloat16, device=CPU, speed="max")
    assert isinstance(stage, Stage)
    assert (stage.path, "no C compiler" in str(stage.reason)) == ("reference", True)


@pytest.mark.usefixtures("no_kernels")
def test_a_command_says_once_why_it_is_not_fast_unless_told_to_be_quiet(shipped: Path, run_command: RunCommand) -> None:
    arguments = ["llamarun", "generate", shipped, "-p", "import os", "-n", 3, "--temp", 0]
    loud, quiet = run_command(*arguments), run_command(*arguments, "-q")
    asked = run_command(*arguments, "--speed", "reference")
    assert [done.code for done in (loud, quiet, asked)] == [0, 0, 0]
    assert [done.err.count("no C compiler") for done in (loud, quiet, asked)] == [1, 0, 0]
    assert loud.out == quiet.out == asked.out


def test_families_without_kernels_and_unknown_speeds_are_named(shipped: Path) -> None:
    model = make_model()
    model.config.hidden_act = "gelu"
    units = StageRange("cpu", 0, 3, has_embedding=True, has_head=True)
    found = set_up(model, [units], [CPU], speed=Speed.AUTO)
    assert isinstance(found, Unavailable)
    assert "gelu" in found.reason
    assert set_up(model, [units], [torch.device("meta")], speed=Speed.AUTO) is None
    with pytest.raises(UsageError, match="ludicrous"):
        set_speed(load(shipped), "ludicrous")


def test_numbers_and_walk_say_which_path_served(shipped: Path, run_command: RunCommand) -> None:
    import json

    for speed, path in (("max", "fast"), ("reference", "reference")):
        arguments = ["llamarun", "generate", shipped, "-p", "import os", "--ignore-eos", "--speed", speed]
        done = run_command(*arguments, "-n", 2, "--json")
        (stage,) = json.loads(done.out)["stages"]
        assert stage["path"] == path
        assert stage["decode_steps"] == 1
        assert 0 < stage["decode_compute_seconds"] <= json.loads(done.out)["median_seconds_per_token"]
        walk = run_command(*arguments, "-n", 4, "--verbose")
        assert walk.err.count(f" ms ({path})\n") >= 3
