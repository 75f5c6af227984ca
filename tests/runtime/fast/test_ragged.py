"""Steps of several sequences of different lengths, against each sequence by transformers alone."""

import itertools
import platform
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import CPU, as_stage
from replay import Replays
from test_cuda_graph import recorded_model
from test_fast import CONFIGS, VOCAB_SIZE, distance, fast_model, make_model
from transformers import DynamicCache, LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from plans.checkpoint.folder import open_checkpoint
from plans.native.building import Unavailable, find_compiler, load_from
from runtime import load
from runtime.fast import model as fast_module
from runtime.fast.kernels import FastStage
from runtime.fast.model import FastModel, Part, RotaryTables
from runtime.fast.native import MAX_ROWS, SOURCE, Library
from runtime.fast.slots import SlotCache, supports_slots
from runtime.fast.speed import Choice
from runtime.reading.tensors import FolderTensors
from runtime.stages.stage import build_stage

PROMPTS = (5, 1, 9, 3, 12)
"""Lengths of the prompts in slots 0, 1, ..."""
STEPS = ((0, 2), (2, 1, 0), (1,), (3, 0, 4, 2, 1), (4, 1))
"""Which slots take each step, in which order of rows."""


def tokens(slot: int, count: int) -> torch.Tensor:
    """The beginning of what is in a slot: always the same."""
    generator = torch.Generator().manual_seed(slot + 10)
    return torch.randint(3, VOCAB_SIZE, (40,), generator=generator)[:count]


def new_slots(model: Any, *, num_slots: int = len(PROMPTS), capacity: int = 40) -> SlotCache:
    devices = [torch.device("cpu")] * len(model.model.layers)
    cache = SlotCache(model.config, num_slots=num_slots, capacity=capacity, dtype=model.dtype, devices=devices)
    for buffer in itertools.chain.from_iterable(cache.buffers):
        buffer.zero_()  # as on a device: a graph reads spare room too
    return cache


@torch.no_grad()
def expected_logits(model: Any, slot: int, length: int) -> torch.Tensor:
    """The last logits [V] of a slot's first tokens, by transformers in one forward."""
    return model(tokens(slot, length)[None], past_key_values=DynamicCache(config=model.config)).logits[0, -1].float()


def run(model: Any, fast: FastModel, *, steps: Sequence[Sequence[int]] = STEPS) -> list[dict[int, torch.Tensor]]:
    """Read the prompts into their slots by transformers, then take the steps; logits [V] by slot of every step."""
    cache, found = new_slots(model), []
    for slot, length in enumerate(PROMPTS):
        with torch.no_grad():
            model(tokens(slot, length)[None], past_key_values=cache[slot])
    for slots in steps:
        ids = torch.stack([tokens(slot, cache.length(slot) + 1)[-1] for slot in slots])
        found.append(dict(zip(slots, fast.ragged(ids, slots=slots, cache=cache).float(), strict=True)))
    return found


def assert_right(model: Any, found: list[dict[int, torch.Tensor]], *, most: float = 1e-5) -> None:
    lengths = list(PROMPTS)
    for logits in found:
        for slot, row in logits.items():
            lengths[slot] += 1
            assert distance(row, expected_logits(model, slot, lengths[slot])) < most


@pytest.mark.parametrize("name", CONFIGS)
def test_each_sequence_of_a_step_gets_the_logits_it_gets_alone(name: str, kernels: Library) -> None:
    model = make_model(name)
    assert_right(model, run(model, fast_model(model, kernels)))


@pytest.mark.parametrize("is_first_fast", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral window", "granite"])
def test_a_stage_that_torch_multiplies_takes_each_sequence_alone(
    name: str, is_first_fast: bool, kernels: Library
) -> None:
    model = make_model(name)
    first, last = as_stage(0, 2, num_layers=3), as_stage(2, 5, num_layers=3)
    head = FastStage(kernels, model.model.layers[1:], model.config, norm=model.model.norm, head=model.lm_head)
    always, never = Choice(((1000, 1),)), Choice(())
    parts = [
        Part(first, FastStage(kernels, model.model.layers[:1], model.config), always if is_first_fast else never),
        Part(last, head, never if is_first_fast else always),
    ]
    assert_right(model, run(model, FastModel(model, parts)))


@pytest.mark.parametrize("inner", [(), (2,), (1, 4)])
@pytest.mark.parametrize("name", ["llama", "mistral window", "granite"])
def test_a_graph_computes_all_slots_and_writes_to_those_that_take_a_step(name: str, inner: tuple[int, ...]) -> None:
    model, recorder = make_model(name), Replays()
    assert_right(model, run(model, recorded_model(model, recorder, *inner)))
    assert recorder.replays > recorder.runs


def test_a_step_touches_no_other_slot(kernels: Library) -> None:
    model = make_model()
    for fast in (fast_model(model, kernels), recorded_model(model, Replays())):
        cache = new_slots(model, capacity=4)
        for layer in cache.buffers:
            for part in layer:
                part.normal_()
        cache[0].layers[0].length = 4  # full: there is no room that could be written by mistake
        before = [part.clone() for layer in cache.buffers for part in layer]
        for _ in range(3):
            fast.ragged(torch.tensor([5, 6]), slots=[3, 1], cache=cache)
        for old, new in zip(before, (part for layer in cache.buffers for part in layer), strict=True):
            assert torch.equal(old[[0, 2, 4]], new[[0, 2, 4]])
            assert not torch.equal(old[[1, 3]], new[[1, 3]])
            assert torch.equal(old[[1, 3], :, 3:], new[[1, 3], :, 3:])


def test_more_sequences_than_one_call_takes_get_the_same_logits(kernels: Library) -> None:
    model, count = make_model(), MAX_ROWS + 3
    fast, cache = fast_model(model, kernels), new_slots(model, num_slots=MAX_ROWS + 3)
    slots = list(reversed(range(count)))
    ids = torch.stack([tokens(slot, 1)[0] for slot in slots])
    found = fast.ragged(ids, slots=slots, cache=cache)
    for slot, row in zip(slots, found, strict=True):
        assert distance(row, expected_logits(model, slot, 1)) < 1e-5


def test_a_prompt_goes_into_its_slot_in_pieces_between_steps_of_others(kernels: Library) -> None:
    model = make_model("qwen2 window")
    fast, cache = fast_model(model, kernels), new_slots(model)
    with torch.no_grad():
        model(tokens(1, 3)[None], past_key_values=cache[1])
    for end in (4, 9, 11):
        piece = tokens(0, end)[None, cache.length(0) :]
        logits = fast.step(piece, attention_mask=None, position_ids=None, cache=cache[0])
        assert logits is not None
        assert distance(logits[0, -1], expected_logits(model, 0, end)) < 1e-5
        ids = tokens(1, cache.length(1) + 1)[-1:]
        assert_row = fast.ragged(ids, slots=[1], cache=cache)[0]
        assert distance(assert_row, expected_logits(model, 1, cache.length(1))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["3 heads per key, long rows", "biases, nothing a multiple of 16", "mistral window"])
def test_no_bit_of_a_sequence_depends_on_what_shares_its_step(name: str, dtype: torch.dtype, kernels: Library) -> None:
    check_company(name, dtype, kernels)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiler options of another processor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nor_does_it_on_processors_that_can_do_less(dtype: torch.dtype, other_kernels: Library) -> None:
    check_company("3 heads per key, long rows", dtype, other_kernels)


@pytest.fixture(scope="module", params=["-mno-avx512f -mtune=znver3", "-mno-amx-tile"])
def other_kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The kernels of a processor with less; GCC takes some chains of sums for faster unfused on a Zen 3."""
    compiler = find_compiler()
    assert not isinstance(compiler, Unavailable), compiler.reason
    path = tmp_path_factory.mktemp("other") / "kernels.so"
    found = load_from(path, SOURCE, Library, compiler=(*compiler, *request.param.split()))
    assert isinstance(found, Library), found.reason
    return found


def check_company(name: str, dtype: torch.dtype, kernels: Library) -> None:
    """Whoever shares a step with a sequence, its logits are those it gets alone, to the bit."""
    model, draw = make_model(name, dtype=dtype, num_hidden_layers=2), random.Random(name)
    fast, cache = fast_model(model, kernels), new_slots(model, num_slots=MAX_ROWS, capacity=64)
    lengths = [draw.randrange(30) for _ in range(MAX_ROWS)]
    for slot, length in enumerate(lengths):
        read_in_pieces(fast, cache, slot, length, draw)
    ids = torch.tensor([draw.randrange(VOCAB_SIZE) for _ in lengths])
    alone = torch.cat([fast.ragged(ids[slot, None], slots=[slot], cache=cache) for slot in range(MAX_ROWS)])
    for count in range(2, MAX_ROWS + 1):
        slots = draw.sample(range(MAX_ROWS), count)
        for slot in slots:
            cache.keep(slot, num_tokens=lengths[slot])
        assert torch.equal(fast.ragged(ids[slots], slots=slots, cache=cache), alone[slots])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_bit_of_a_sequence_depends_on_how_the_kernels_read_its_prompt(dtype: torch.dtype, kernels: Library) -> None:
    model, draw = make_model("3 heads per key, long rows", dtype=dtype, num_hidden_layers=2), random.Random(1)
    fast, cache = fast_model(model, kernels), new_slots(model, num_slots=4)
    last = [read_in_pieces(fast, cache, slot, 30, draw, seed=0) for slot in range(4)]
    assert all(torch.equal(logits, last[0]) for logits in last)
    for keys, values in cache.buffers:
        assert all(torch.equal(part[slot], part[0]) for part in (keys, values) for slot in range(4))


def read_in_pieces(
    fast: FastModel, cache: SlotCache, slot: int, length: int, draw: random.Random, *, seed: int | None = None
) -> torch.Tensor | None:
    """Read the beginning of a slot by the kernels, up to MAX_ROWS tokens at a time; returns the last logits [V]."""
    logits = None
    while (past := cache.length(slot)) < length:
        end = min(length, past + draw.randint(1, MAX_ROWS))
        piece = tokens(slot if seed is None else seed, end)[None, past:]
        logits = fast.step(piece, attention_mask=None, position_ids=None, cache=cache[slot])
    return None if logits is None else logits[0, -1]


def test_a_slot_keeps_the_beginning_it_shares_with_the_next_prompt(kernels: Library) -> None:
    model = make_model()
    fast, cache = fast_model(model, kernels), new_slots(model)
    with torch.no_grad():
        model(torch.cat([tokens(0, 6), tokens(1, 9)])[None], past_key_values=cache[0])
    cache.keep(0, num_tokens=6)
    assert cache.length(0) == 6
    found = fast.ragged(tokens(0, 7)[-1:], slots=[0], cache=cache)[0]
    assert distance(found, expected_logits(model, 0, 7)) < 1e-5
    cache.keep(0, num_tokens=0)
    assert distance(fast.ragged(tokens(0, 1), slots=[0], cache=cache)[0], expected_logits(model, 0, 1)) < 1e-5


def test_a_slot_keeps_what_a_sliding_window_no_longer_sees(kernels: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_module, "STEP_SLOTS", 8)
    model = make_model("mistral window")
    fast, cache = fast_model(model, kernels), new_slots(model)
    for end in (13, 17, 22, 23, 24, 31):
        piece = tokens(0, end)[None, cache.length(0) :]
        logits = fast.step(piece, attention_mask=None, position_ids=None, cache=cache[0])
        assert logits is not None
        assert distance(logits[0, -1], expected_logits(model, 0, end)) < 1e-5
    cache.keep(0, num_tokens=20)
    found = fast.ragged(tokens(0, 21)[-1:], slots=[0], cache=cache)[0]
    assert distance(found, expected_logits(model, 0, 21)) < 1e-5


@pytest.mark.parametrize("speed", ["reference", "max"])
def test_a_chain_and_its_stages_apart_take_ragged_steps(speed: str, shipped: Path) -> None:
    edges = ((0, 4), (4, 9))
    chain = load(shipped, stages=[as_stage(*edge, num_layers=7) for edge in edges], dtype="fp32", speed=speed)
    tensors = FolderTensors(open_checkpoint(shipped))
    stages = [
        build_stage(chain.config, spec, tensors, dtype=torch.float32, device=CPU, speed=speed) for spec in chain.stages
    ]
    whole, apart = chain.new_slots(num_slots=3, capacity=16), [s.new_slots(num_slots=3, capacity=16) for s in stages]
    alone = {slot: chain.new_cache() for slot in (0, 2)}
    prompts = {0: torch.tensor([[5, 6, 7, 8]]), 2: torch.tensor([[9]])}
    with torch.no_grad():
        for slot, ids in prompts.items():
            chain(ids, past_key_values=alone[slot])
            chain(ids, past_key_values=whole[slot])
            for stage, cache in zip(stages, apart, strict=True):
                ids = stage(ids, cache=cache[slot])
        for step in range(3):
            hidden = ids = torch.tensor([20 + step, 30 + step])
            found = chain.ragged(ids, slots=[2, 0], cache=whole)
            for stage, cache in zip(stages, apart, strict=True):
                hidden = stage.ragged(hidden, slots=[2, 0], cache=cache)
            expected = [chain(ids[r, None, None], past_key_values=alone[s]).logits[0, -1] for r, s in enumerate((2, 0))]
            assert torch.equal(found, hidden)
            assert torch.equal(found, torch.stack(expected)) or (
                speed == "max" and distance(found, torch.stack(expected)) < 1e-5
            )


def test_keys_and_values_can_be_kept_in_another_dtype(shipped: Path) -> None:
    chain = load(shipped, dtype="fp32")
    chain.kv_cache_dtype = torch.bfloat16
    cache, alone, ids = chain.new_slots(num_slots=2, capacity=8), chain.new_cache(), torch.tensor([[5, 6, 7]])
    assert cache.buffers[0][0].dtype == torch.bfloat16
    with torch.no_grad():
        for kept in (cache[1], alone):
            chain(ids, past_key_values=kept)
        found = chain.ragged(ids[0, :1], slots=[1], cache=cache)
        assert torch.equal(found, chain(ids[:, :1], past_key_values=alone).logits[:, -1])


def test_rotary_frequencies_of_a_whole_batch_are_refused_with_the_reason() -> None:
    assert supports_slots(LlamaConfig()) is None
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "dynamic" in str(supports_slots(LlamaConfig(rope_parameters=dynamic)))
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    long = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096, **factors}
    assert "longrope" in str(supports_slots(Phi3Config(rope_parameters=long)))


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_factors_that_are_looked_up_are_those_of_the_position_alone(
    rope: dict[str, Any], dtype: torch.dtype
) -> None:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=parameters)
    rotary, like = LlamaRotaryEmbedding(config), torch.zeros(1, 1, 64, dtype=dtype)
    tables = RotaryTables(rotary)
    for positions in ([0], [255, 3], [256], [70, 2999, 1024], [1]):
        cos, sin = tables.at(positions, like=like)
        for row, position in enumerate(positions):
            alone = rotary(like, position_ids=torch.tensor([[position]]))
            assert torch.equal(cos[row : row + 1], alone[0])
            assert torch.equal(sin[row : row + 1], alone[1])
