"""Recorded steps against transformers itself. On a CPU everything is the same but for how work is recorded."""

import gc
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import CPU, as_stage, stages_step, trace
from replay import NeverWaits, Replays
from test_fast import CONFIGS, VOCAB_SIZE, _positions, distance, make_model, prompt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GemmaConfig, MixtralConfig

from plans.native.building import Unavailable
from plans.stages import StageRange
from runtime import load
from runtime.fast import setup as fast_setup
from runtime.fast.cache import STEP_SLOTS, FastLayer
from runtime.fast.choice import GRAPH_ROWS, try_graphs
from runtime.fast.graphs import GraphStage, Recorder, supports_graphs
from runtime.fast.model import FastModel, Part
from runtime.fast.native import Library
from runtime.fast.setup import recorded, set_up
from runtime.fast.speed import Choice, Speed
from runtime.generate.clock import stage_clock
from runtime.stages.stage import build_stage

ALWAYS = Choice(((1, 1),))
PROMPT = 11


def cut(num_layers: int, *inner: int) -> list[StageRange]:
    edges = (0, *inner, num_layers + 2)
    return [as_stage(a, b, num_layers=num_layers) for a, b in pairwise(edges)]


def recorded_model(model: Any, recorder: Recorder, *inner: int) -> FastModel:
    """The model with every stage but a bare embedding recorded."""
    parts = []
    for units in cut(len(model.model.layers), *inner):
        has_work = units.num_layers or units.has_head
        parts.append(Part(units, recorded(model, units, recorder) if has_work else None, ALWAYS))
    return FastModel(model, parts)


class Run:
    """A sequence of steps by transformers, or by recorded stages where those serve."""

    def __init__(self, model: Any, fast: FastModel | None = None) -> None:
        self.model, self.fast = model, fast
        self.cache = DynamicCache(config=model.config)
        self.num_fast = 0

    @torch.no_grad()
    def step(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = _positions(ids, mask)
        inputs = {"attention_mask": mask, "position_ids": positions}
        logits = None if self.fast is None else self.fast.step(ids, **inputs, cache=self.cache)
        if logits is None:
            logits = self.model(ids, **inputs, past_key_values=self.cache, logits_to_keep=1).logits
        else:
            self.num_fast += 1
        return logits[:, -1].float()

    def greedy(self, ids: torch.Tensor, mask: torch.Tensor, *, num_tokens: int) -> torch.Tensor:
        new = ids
        for _ in range(num_tokens):
            best = self.step(new, mask)
            best[:, 2] = -torch.inf  # generate() is told not to stop
            new = best.argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, new], dim=1), torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        return ids


def more(mask: torch.Tensor) -> torch.Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def feed(runs: list[Run], *, batch: int, steps: int, length: int = PROMPT) -> list[float]:
    """The same left-padded prompt and random tokens through two runs; how far apart each step's logits are."""
    ids, mask = prompt(batch, length)
    generator, apart = torch.Generator().manual_seed(2), []
    for _ in range(steps + 1):
        found, expected = (run.step(ids, mask) for run in runs)
        apart.append(distance(found, expected))
        ids, mask = torch.randint(3, VOCAB_SIZE, (batch, 1), generator=generator), more(mask)
    return apart


@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_logits_of_every_family_are_those_of_transformers(name: str) -> None:
    model, recorder = make_model(name), Replays()
    fast = Run(model, recorded_model(model, recorder, 2, 3))
    assert max(feed([fast, Run(model)], batch=3, steps=8)) < 1e-5
    assert (fast.num_fast, recorder.runs, recorder.records, recorder.replays) == (8, 3, 3, 21)


@pytest.mark.parametrize("inner", [(), (2,), (1, 3)], ids=["whole", "two stages", "embedding alone"])
def test_40_greedy_tokens_are_those_of_generate(inner: tuple[int, ...]) -> None:
    model = make_model("qwen3")
    ids, mask = prompt(3)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    run = Run(model, recorded_model(model, Replays(), *inner))
    assert torch.equal(run.greedy(ids, mask, num_tokens=40), expected)
    assert run.num_fast == 39


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite", "phi3 half rotary"])
def test_bf16_is_no_farther_from_the_truth_than_transformers(name: str) -> None:
    model = make_model(name, dtype=torch.bfloat16)
    exact = make_model(name).double()
    exact.load_state_dict(model.state_dict())
    own = feed([Run(model, recorded_model(model, Replays(), 2)), Run(exact)], batch=5, steps=8)
    reference = feed([Run(model), Run(exact)], batch=5, steps=8)
    assert sum(own) < 1.3 * sum(reference)


def test_a_cache_that_outgrows_its_buffers_is_recorded_anew() -> None:
    model, recorder = make_model(num_hidden_layers=1), Replays()
    fast = Run(model, recorded_model(model, recorder))
    assert max(feed([fast, Run(model)], batch=2, steps=10, length=STEP_SLOTS - 5)) < 1e-5
    assert fast.cache.layers[0].capacity == 2 * STEP_SLOTS
    assert (recorder.runs, recorder.records, recorder.replays) == (2, 2, 8)


def test_a_window_hides_what_is_behind_it_until_transformers_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.fast import model as fast_model

    monkeypatch.setattr(fast_model, "STEP_SLOTS", 16)
    model = make_model("mistral window")  # looks back on 7 tokens
    fast = Run(model, recorded_model(model, Replays(), 2))
    assert max(feed([fast, Run(model)], batch=3, steps=25, length=4)) < 1e-5
    assert fast.num_fast == 7 + 16 - 4


def test_every_cache_has_its_own_recording_and_takes_it_along() -> None:
    model, recorder = make_model(), Replays()
    fast = recorded_model(model, recorder)
    runs = [[Run(model, fast), Run(model)] for _ in range(2)]
    ids, mask = prompt(2)
    for step in range(5):  # in turns, as requests in flight
        for own, reference in runs:
            assert distance(own.step(ids, mask), reference.step(ids, mask)) < 1e-5
        ids, mask = (ids[:, -1:] + step) % VOCAB_SIZE, more(mask)
    assert (recorder.runs, recorder.records) == (2, 2)
    stage = fast._parts[0].fast
    assert isinstance(stage, GraphStage)
    assert len(stage._recordings) == 2
    buffers = weakref.ref(runs[0][0].cache.layers[0].buffers[0])
    recorder_only = list(stage._recordings.values())
    del own, reference, runs[0], recorder_only
    gc.collect()
    assert len(stage._recordings) == 1
    assert buffers() is None


def test_after_a_crop_the_same_recording_goes_on() -> None:
    model, recorder = make_model(), Replays()
    run, reference = Run(model, recorded_model(model, recorder)), Run(model)
    ids, mask = prompt(2)
    for length in (PROMPT, PROMPT + 1, PROMPT + 2, PROMPT + 3, PROMPT + 1, PROMPT + 2):
        for each in (run, reference):
            if length <= each.cache.get_seq_length():
                each.cache.crop(length - 1 - each.cache.get_seq_length())
        new = ids if length == PROMPT else (ids[:, :1] + length) % VOCAB_SIZE
        mask = torch.cat([prompt(2)[1], mask.new_ones(2, length - PROMPT)], dim=1)
        assert distance(run.step(new, mask), reference.step(new, mask)) < 1e-5
    assert (recorder.runs, recorder.records, recorder.replays) == (1, 1, 4)


def test_beams_change_places_within_the_buffers() -> None:
    model, recorder = make_model(), Replays()
    run, reference = Run(model, recorded_model(model, recorder)), Run(model)
    ids, mask = prompt(4)
    for step in range(6):
        assert distance(run.step(ids, mask), reference.step(ids, mask)) < 1e-5
        for each in (run, reference):
            each.cache.reorder_cache(torch.tensor([1, 0, 3, 3]))
        mask = more(mask[torch.tensor([1, 0, 3, 3])])
        ids = (ids[:, -1:] + step) % VOCAB_SIZE
    assert recorder.records == 1
    for each in (run, reference):
        each.cache.batch_select_indices(torch.tensor([2, 0]))
    assert distance(run.step(ids[:2], more(mask[[2, 0]])[:, :-1]), reference.step(ids[:2], mask[[2, 0]])) < 1e-5
    assert (recorder.runs, recorder.records) == (2, 1)


def test_a_mask_with_holes_is_honoured() -> None:
    model = make_model()
    run, reference = Run(model, recorded_model(model, Replays())), Run(model)
    ids, mask = prompt(2)
    for each in (run, reference):
        each.step(ids, mask)
    mask[0, 6] = 0
    for _ in range(3):
        mask = more(mask)
        assert distance(run.step(ids[:, :1], mask), reference.step(ids[:, :1], mask)) < 1e-5
    assert run.num_fast == 3


def test_what_lies_in_spare_slots_never_counts() -> None:
    model = make_model()
    run, reference = Run(model, recorded_model(model, Replays())), Run(model)
    ids, mask = prompt(2)
    for each in (run, reference):
        each.step(ids, mask)
    for layer in run.cache.layers:
        assert not any(buffer[:, :, PROMPT:].any() for buffer in layer.buffers)
        for buffer in layer.buffers:
            buffer[:, :, PROMPT:] = 1e4
    for _ in range(3):
        mask = more(mask)
        assert distance(run.step(ids[:, :1], mask), reference.step(ids[:, :1], mask)) < 1e-5


def test_first_tokens_and_several_at_once_are_left_to_transformers() -> None:
    model = make_model()
    fast = recorded_model(model, Replays(), 2)
    with torch.no_grad():
        for ids in (torch.tensor([[5]]), torch.tensor([[5, 6, 7]])):
            cache = DynamicCache(config=model.config)
            assert fast.step(ids, attention_mask=None, position_ids=None, cache=cache) is None
            assert all(type(layer) is FastLayer for layer in cache.layers)
            model(ids, past_key_values=cache)
            assert fast.step(ids[:, :1], attention_mask=None, position_ids=None, cache=cache) is not None
            assert fast.step(ids.repeat(1, 2), attention_mask=None, position_ids=None, cache=cache) is None


@pytest.mark.parametrize("name", ["llama", "qwen2 window", "granite"])
def test_no_step_waits_for_the_device(name: str) -> None:
    model = make_model(name)
    fast = recorded_model(model, Replays(), 1, 3)
    cache = DynamicCache(config=model.config)
    ids, mask = prompt(2, 5)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        for _ in range(3):  # without recording, recorded, replayed
            mask = more(mask)
            positions = _positions(ids[:, :1], mask)
            with NeverWaits() as seen:
                assert fast.step(ids[:, :1], attention_mask=mask, position_ids=positions, cache=cache) is not None
            assert len(seen.log) > 10
        with pytest.raises(AssertionError, match="waits for equal"), NeverWaits():
            torch.equal(mask, mask)


class OneDevice(TorchDispatchMode):
    """Fails where an operation takes or gives a tensor elsewhere: on CUDA that is a copy that cannot be recorded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors), func
        return result


@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_work_stays_on_its_device_and_reads_no_value(name: str) -> None:
    model = make_model(name).to("meta")
    layers, norm, head = model.model.layers, model.model.norm, model.lm_head
    stage = GraphStage(layers, model.config, recorder=Replays(), norm=norm, head=head)
    shape = (2, model.config.num_key_value_heads, 5, layers[0].self_attn.head_dim)
    cache = [FastLayer() for _ in layers]
    for layer in cache:
        layer.update(*torch.empty((2, *shape), device="meta"))
    hidden = torch.empty(2, 1, model.config.hidden_size, device="meta")
    cos, sin = model.model.rotary_emb(hidden, position_ids=torch.zeros((2, 1), dtype=torch.int64, device="meta"))
    for _ in range(2):
        with OneDevice():
            logits = stage.step(hidden, cos, sin, attention_mask=torch.ones(2, 6, device="meta"), cache=cache[:])
        for layer in cache:
            layer.crop(-1)
    assert logits.shape == (2, 1, VOCAB_SIZE)


# --- where it is used -----------------------------------------------------------------------------------------------


@pytest.fixture
def cpu_records(monkeypatch: pytest.MonkeyPatch) -> list[Replays]:
    """Stages on a CPU are recorded as those on CUDA are; gives the recorders."""
    made: list[Replays] = []

    def make(device: torch.device) -> Replays:
        made.append(Replays())
        return made[-1]

    monkeypatch.setitem(fast_setup.RECORDERS, "cpu", make)
    return made


@pytest.mark.parametrize("texts", [1, 3], ids=["one", "padded batch"])
def test_a_chain_generates_the_tokens_of_the_reference(texts: int, shipped: Path, cpu_records: list[Replays]) -> None:
    inputs = dict(zip(("input_ids", "attention_mask"), prompt(texts), strict=True))
    modes: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8},
        {"num_beams": 3, "do_sample": False},
        {"prefill_chunk_size": 3, "do_sample": False},
    ]
    reference = load(shipped, dtype="fp32")
    chain = load(shipped, stages=cut(7, 3, 6), dtype="fp32", speed="max")
    assert chain.stage_path(0, num_rows=1) == "fast"
    for mode in modes:
        tokens = []
        for model in (reference, chain):
            torch.manual_seed(0)
            tokens.append(model.generate(**inputs, **mode, max_new_tokens=24, min_new_tokens=24, pad_token_id=0))
        assert torch.equal(*tokens), mode
    (recorder,) = cpu_records  # one for all stages of a device
    assert recorder.replays > 3 * 4 * 20


def test_a_chain_speaks_of_its_stages_and_is_timed_as_one_path(shipped: Path, cpu_records: list[Replays]) -> None:
    chain = load(shipped, stages=cut(7, 1, 4), dtype="fp32", speed="max")
    ids = torch.tensor([[5, 6, 7]])
    with stage_clock(chain) as totals:
        chain.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert [time.num_fast_steps for time in totals] == [0, 4, 4]  # an embedding alone is transformers'
    assert all(time.compute_seconds > 0 for time in totals)


def test_separate_stages_are_recorded_too(shipped: Path, cpu_records: list[Replays]) -> None:
    from plans.checkpoint.folder import open_checkpoint
    from runtime.reading.families import parse_model_config
    from runtime.reading.tensors import FolderTensors

    checkpoint = open_checkpoint(shipped)
    config, tensors = parse_model_config(checkpoint.config.raw), FolderTensors(checkpoint)
    results = []
    for speed in ("reference", "max"):
        stages = [
            build_stage(config, spec, tensors, dtype=torch.float32, device=CPU, speed=speed) for spec in cut(7, 4, 8)
        ]
        results.append(trace(stages_step(stages), vocab_size=config.vocab_size, num_tokens=6))
    assert max(distance(a, b) for a, b in zip(*results, strict=True)) < 1e-5
    assert [stage.path for stage in stages] == ["fast", "fast", "fast"]
    assert [recorder.replays > 0 for recorder in cpu_records] == [True, True, True]


@pytest.mark.parametrize("kinds", ["gk", "kg", "gkg", "gr", "rg"])
def test_graphs_kernels_and_transformers_share_a_chain(kinds: str, kernels: Library) -> None:
    from runtime.fast.setup import _native

    model = make_model("granite")
    parts = []
    for kind, units in zip(kinds, cut(3, 2, 3)[: len(kinds) - 1] + cut(3, 2, 3)[-1:], strict=True):
        whole = units if len(kinds) == 3 or not units.has_head else as_stage(2, 5, num_layers=3)
        makers = {"g": lambda u: recorded(model, u, Replays()), "k": lambda u: _native(model, u, kernels)}
        parts.append(Part(whole, makers[kind](whole) if kind in makers else None, ALWAYS))
    fast = Run(model, FastModel(model, parts))
    assert max(feed([fast, Run(model)], batch=2, steps=4)) < 1e-5
    assert fast.num_fast >= 4


def test_where_nothing_can_be_recorded_the_reason_is_said_and_transformers_serves(
    shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fast_setup.RECORDERS, "cpu", lambda _device: Replays(fails_from=1))
    with pytest.warns(UserWarning, match="this driver cannot capture"):
        chain = load(shipped, speed="max")
    assert chain.fast is None
    assert "this driver cannot capture" in str(chain.reason)


def test_a_recording_that_fails_later_ends_the_fast_path_and_loses_no_token() -> None:
    model = make_model()
    fast = Run(model, recorded_model(model, Replays(fails_from=2), 2))  # the second stage's
    with pytest.warns(UserWarning, match="reference path from here on") as said:
        assert max(feed([fast, Run(model)], batch=2, steps=6)) < 1e-5
    assert len(said) == 1
    assert fast.num_fast == 6  # the first stage goes on
    alone = Run(model, recorded_model(model, Replays(fails_from=1)))
    with pytest.warns(UserWarning, match="cannot capture"):
        assert max(feed([alone, Run(model)], batch=2, steps=6)) < 1e-5
    assert alone.num_fast == 2


@pytest.mark.parametrize("edges", [(0, 9), (0, 8, 9)], ids=["layers", "head alone"])
def test_measuring_decides_for_every_batch(edges: tuple[int, ...], shipped: Path) -> None:
    stage = [as_stage(a, b, num_layers=7) for a, b in pairwise(edges)][-1]
    choice = try_graphs(load(shipped), stage, Replays(), is_measured=True)
    assert isinstance(choice, Choice)
    assert [rows for rows, _ in choice.threads_by_rows] == list(GRAPH_ROWS)
    assert {threads for _, threads in choice.threads_by_rows} <= {0, 1}


def test_what_cannot_be_recorded_is_named() -> None:
    assert supports_graphs(MixtralConfig()) == "no CUDA graph is made for mixtral"
    assert supports_graphs(GemmaConfig()) == "no CUDA graph is made for gemma"
    model = make_model()
    assert supports_graphs(model.config) is None
    model.set_attn_implementation("flex_attention")
    assert "flex_attention" in str(supports_graphs(model.config))


def test_one_kind_of_device_that_fails_leaves_the_other_fast(kernels: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fast_setup.RECORDERS, "cuda", lambda _device: Replays())
    monkeypatch.setenv("CC", "no-such-compiler")
    model, stages = make_model(), cut(3, 2)
    devices = [CPU, torch.device("cuda", 0)]  # where the weights really are matters to nothing here
    fast = set_up(model, stages, devices, speed=Speed.MAX)
    assert isinstance(fast, FastModel)
    assert "no C compiler" in str(fast.reason)
    assert [fast.path(index, num_rows=1) for index in range(2)] == ["reference", "fast"]
    assert isinstance(set_up(model, stages, [CPU, CPU], speed=Speed.MAX), Unavailable)
    assert set_up(model, stages, devices, speed=Speed.REFERENCE) is None


# --- the real thing -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cuda_graphs_give_the_tokens_of_transformers(dtype: str, shipped: Path) -> None:
    gpu = dict.fromkeys(range(3), "cuda:0")
    reference, chain = (
        load(shipped, stages=cut(7, 3, 6), device_map=gpu, dtype=dtype, speed=speed) for speed in ("reference", "max")
    )
    assert chain.reason is None
    ids, mask = (tensor.to("cuda:0") for tensor in prompt(3))
    tokens = [
        model.generate(ids, attention_mask=mask, max_new_tokens=300, min_new_tokens=300, do_sample=False)
        for model in (reference, chain)
    ]
    same = (tokens[0] == tokens[1]).float().mean()
    assert same == 1 if dtype == "fp32" else same > 0.1
    assert all(part.fast is not None and part.fast.failure is None for part in chain.fast._parts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_a_step_on_cuda_does_not_wait(shipped: Path) -> None:
    chain = load(shipped, device_map={0: "cuda:0"}, dtype="bf16", speed="max")
    cache, ids = chain.new_cache(), torch.tensor([[5, 6, 7]], device="cuda:0")
    with torch.inference_mode():
        chain(ids, past_key_values=cache)
        for _ in range(2):
            chain(ids[:, :1], past_key_values=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits = chain(ids[:, :1], past_key_values=cache).logits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(logits).all()
