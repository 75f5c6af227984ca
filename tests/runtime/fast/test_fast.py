"""The CPU fast path against transformers itself, on random models of every family it computes."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    DynamicCache,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer

from runtime.fast.cache import STEP_SLOTS, FastLayer, adopt
from runtime.fast.kernels import FastStage, first_slots, supports, supports_weights
from runtime.fast.model import FastModel
from runtime.fast.native import MAX_ROWS, Library
from runtime.fast.setup import whole
from runtime.fast.speed import Choice

VOCAB_SIZE = 101
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "biases, nothing a multiple of 16": (
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "hidden_size": 36, "intermediate_size": 57, "head_dim": 10},
    ),
    "one head per key": (LlamaConfig, {"num_key_value_heads": 4, "head_dim": 32}),
    "20 heads per key": (LlamaConfig, {"hidden_size": 80, "num_attention_heads": 20, "num_key_value_heads": 1}),
    "3 heads per key, long rows": (
        LlamaConfig,
        {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "head 80": (LlamaConfig, {"head_dim": 80}),
    "head 96": (LlamaConfig, {"head_dim": 96}),
    "head 128": (LlamaConfig, {"head_dim": 128, "num_attention_heads": 8}),
    "mistral window": (MistralConfig, {"sliding_window": 7, "head_dim": 16}),
    "qwen2": (Qwen2Config, {}),
    "qwen2 window": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 24}),
    "smollm3": (SmolLM3Config, {"num_hidden_layers": 5}),
    "phi3": (Phi3Config, {}),
    "phi3 half rotary": (Phi3Config, {"partial_rotary_factor": 0.5}),
    "granite": (
        GraniteConfig,
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2, "logits_scaling": 5.0},
    ),
}


def make_model(name: str = "llama", *, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """A random model with norms and biases that would show if they were left out."""
    torch.manual_seed(0)
    family, own = CONFIGS[name]
    model: Any = Auto.from_config(family(**SIZES | own | sizes), attn_implementation="sdpa")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn_like(parameter) * spread + ("norm" in key))
    return model.to(dtype).eval()


def fast_model(model: Any, kernels: Library) -> FastModel:
    """The model on the kernels, whatever the number of rows."""
    return whole(model, kernels, Choice(((1000, torch.get_num_threads()),)))


class Run:
    """One sequence of steps of one model, by transformers or by the kernels, on a cache of its own."""

    def __init__(self, model: Any, kernels: Library | None = None) -> None:
        self.model = model
        self.fast = fast_model(model, kernels) if kernels else None
        self.cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def reference(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V] from transformers, in fp32."""
        positions = _positions(ids, mask)
        logits = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache).logits
        return logits.float()

    def step(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V] from the kernels if this run has them, else from transformers."""
        if self.fast is None:
            return self.reference(ids, mask)
        logits = self.fast.step(
            ids, attention_mask=mask, position_ids=_positions(ids, mask), cache=self.cache, logits_to_keep=0
        )
        assert logits is not None
        return logits.float()


def _positions(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]


def prompt(batch: int, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of a left-padded batch."""
    ids = torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(length)[None] >= (torch.arange(batch) % 5)[:, None]).long()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def compare(runs: list[Run], *, batch: int, steps: int, new_tokens: int = 1) -> list[list[torch.Tensor]]:
    """Prefill every run with transformers, then feed all of them the same random tokens; logits per run and step."""
    ids, mask = prompt(batch)
    for run in runs:
        if run.fast:
            adopt(run.cache, num_layers=len(run.model.model.layers))
        run.reference(ids, mask)
    logits: list[list[torch.Tensor]] = [[] for _ in runs]
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        ids = torch.randint(3, VOCAB_SIZE, (batch, new_tokens), generator=generator)
        mask = torch.cat([mask, mask.new_ones(batch, new_tokens)], dim=1)
        for run, found in zip(runs, logits, strict=True):
            found.append(run.step(ids, mask))
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_logits_are_those_of_transformers(name: str, kernels: Library) -> None:
    model = make_model(name)
    expected, found = compare([Run(model), Run(model, kernels)], batch=3, steps=6)
    assert max(map(distance, found, expected)) < 1e-5


@pytest.mark.parametrize("batch", [*range(1, 10), MAX_ROWS + 1])
def test_any_batch_gets_the_same_logits(batch: int, kernels: Library) -> None:
    model = make_model("3 heads per key, long rows", num_hidden_layers=1)
    expected, found = compare([Run(model), Run(model, kernels)], batch=batch, steps=2)
    assert max(map(distance, found, expected)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "biases, nothing a multiple of 16", "qwen3", "smollm3", "phi3", "granite"])
def test_half_precision_is_no_farther_from_the_truth_than_transformers(
    name: str, dtype: torch.dtype, kernels: Library
) -> None:
    model = make_model(name, dtype=dtype)
    exact = copy.deepcopy(model).double()
    truth, expected, found = compare([Run(exact), Run(model), Run(model, kernels)], batch=5, steps=8)
    own = sum(float((a - b).square().sum()) for a, b in zip(found, truth, strict=True)) ** 0.5
    reference = sum(float((a - b).square().sum()) for a, b in zip(expected, truth, strict=True)) ** 0.5
    assert own < 1.2 * reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "granite"])
def test_values_are_rounded_where_transformers_rounds_them(
    name: str, dtype: torch.dtype, kernels: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Processors differ in how torch multiplies half precision (those with AVX-512 BF16 drop small parts of a sum), so
    # transformers gets products that are exact and rounded once. The first token attends to itself alone, in a single
    # layer: in deeper ones a sum that was rounded the other way (their order depends on the processor) changes all of
    # its row. Left are 0.98 to 1; any of the roundings of `kernels.c` left out gives at most 0.87.
    monkeypatch.setattr(torch.nn.functional, "linear", _exact_linear)
    model, ids = make_model(name, dtype=dtype, num_hidden_layers=1), torch.arange(3, 43)[:, None]
    positions, caches = torch.full((40, 1), 77), [DynamicCache(), DynamicCache()]
    found = fast_model(model, kernels).step(ids, attention_mask=None, position_ids=positions, cache=caches[0])
    with torch.no_grad():
        expected = model(ids, position_ids=positions, past_key_values=caches[1]).logits
    (ours,), (theirs,) = (cache.layers for cache in caches)
    assert _share_equal(found, expected) > 0.95
    assert _share_equal(ours.keys, theirs.keys) > 0.95
    assert _share_equal(ours.values, theirs.values) > 0.95


def _exact_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    products = inputs.double() @ weight.double().T
    return (products if bias is None else products + bias.double()).to(inputs.dtype)


def test_attention_weights_are_rounded_as_torch_rounds_them(kernels: Library) -> None:
    model = make_model(dtype=torch.bfloat16, num_hidden_layers=1)
    expected, found = compare([Run(model), Run(model, kernels)], batch=4, steps=4)
    assert _share_equal(torch.stack(found), torch.stack(expected)) > 0.5  # 0.2 without, 0.7 with rounding


def _share_equal(found: Any, expected: torch.Tensor) -> float:
    return float((found == expected).float().mean())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_logits_do_not_depend_on_the_number_of_threads(threads: int, kernels: Library) -> None:
    model, before = make_model(dtype=torch.bfloat16), torch.get_num_threads()
    expected, _ = compare([Run(model, kernels), Run(model)], batch=3, steps=3)
    try:
        torch.set_num_threads(threads)
        found, _ = compare([Run(model, kernels), Run(model)], batch=3, steps=3)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_64_greedy_tokens_are_those_of_generate(kernels: Library) -> None:
    model = make_model("qwen3")
    ids, mask = prompt(3)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    run = Run(model, kernels)
    logits = run.step(ids, mask)
    for _ in range(64):
        ids = torch.cat([ids, _greedy(logits)], dim=1)
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        logits = run.step(ids[:, -1:], mask)
    assert torch.equal(ids, expected)


def _greedy(logits: torch.Tensor) -> torch.Tensor:
    last = logits[:, -1:].clone()
    last[..., 2] = -torch.inf  # generate() was told not to stop
    return last.argmax(-1)


@pytest.mark.parametrize("new_tokens", [2, 5, MAX_ROWS, MAX_ROWS + 3])
@pytest.mark.parametrize("name", ["llama", "mistral window"])
def test_several_new_tokens_see_each_other_in_order(name: str, new_tokens: int, kernels: Library) -> None:
    model = make_model(name)
    expected, found = compare([Run(model), Run(model, kernels)], batch=3, steps=2, new_tokens=new_tokens)
    assert max(map(distance, found, expected)) < 1e-5


def test_a_padded_prompt_can_be_read_by_the_kernels_too(kernels: Library) -> None:
    model = make_model()
    ids, mask = prompt(5)
    native, reference = Run(model, kernels), Run(model)
    found, expected = native.step(ids, mask), reference.reference(ids, mask)
    assert torch.isfinite(found).all()
    assert distance(found * mask[..., None], expected * mask[..., None]) < 1e-5


def test_reference_and_kernels_share_one_cache_step_by_step(kernels: Library) -> None:
    model = make_model()
    mixed, reference = Run(model, kernels), Run(model)
    ids, mask = prompt(2)
    for step in range(6):
        found = (mixed.step if step % 2 else mixed.reference)(ids, mask)
        assert distance(found[:, -1], reference.reference(ids, mask)[:, -1]) < 1e-5
        ids, mask = ids[:, -1:] + step, torch.cat([mask, mask.new_ones(2, 1)], dim=1)


def test_a_cache_grows_without_losing_anything(kernels: Library) -> None:
    model = make_model(num_hidden_layers=1)
    mixed, reference = Run(model, kernels), Run(model)
    ids, mask = prompt(2, STEP_SLOTS - 2)
    mixed.reference(ids, mask)
    reference.reference(ids, mask)
    for _ in range(4):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        assert distance(mixed.step(ids[:, :1], mask), reference.step(ids[:, :1], mask)) < 1e-5
    assert mixed.cache.get_seq_length() == STEP_SLOTS + 2
    assert mixed.cache.layers[0].buffers[0].shape[2] == 2 * STEP_SLOTS


def test_cache_operations_match_those_of_transformers() -> None:
    ours, theirs = FastLayer(), DynamicLayer()
    for layer in (ours, theirs):
        states = torch.arange(2 * 3 * 5 * 4.0).view(2, 3, 5, 4)
        layer.update(states, states + 0.5)
        layer.reorder_cache(torch.tensor([1, 0]))
        layer.batch_repeat_interleave(2)
        layer.crop(-2)
        layer.update(torch.ones(4, 3, 1, 4), torch.zeros(4, 3, 1, 4))
        layer.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)
    assert ours.get_seq_length() == theirs.get_seq_length() == 4
    assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)
    ours.reset()
    assert ours.keys is None
    assert ours.get_seq_length() == 0


def test_what_the_kernels_cannot_do_is_left_to_the_reference_untouched(kernels: Library) -> None:
    model = make_model("mistral window")
    fast = fast_model(model, kernels)
    ids, mask = prompt(2)
    full, holes = DynamicCache(config=model.config), mask.clone()
    holes[0, 5] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=full)  # longer than the window: slots are gone
    static = StaticCache(config=model.config, max_cache_len=64)
    attempts = [(full, None), (static, None), (DynamicCache(config=model.config), holes)]
    for cache, padding in attempts:
        before = cache.get_seq_length()
        assert fast.step(ids[:, :1], attention_mask=padding, position_ids=None, cache=cache) is None
        assert cache.get_seq_length() == before


def test_nan_weights_give_nan_logits(kernels: Library) -> None:
    model = make_model(dtype=torch.bfloat16)
    model.model.layers[1].mlp.up_proj.weight.data[5, 3] = torch.nan
    run = Run(model, kernels)
    assert run.step(*prompt(1)).isnan().all()


def test_a_stage_without_layers_passes_hidden_states_on(kernels: Library) -> None:
    model = make_model()
    stage = FastStage(kernels, [], model.config, norm=model.model.norm, head=model.lm_head)
    hidden, nothing = torch.randn(2, 1, 64), torch.empty(1, 1, 16)
    start = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(stage.decode(hidden, nothing, nothing, start=start, cache=[]), hidden)
    with torch.no_grad():
        assert distance(stage.head(hidden, threads=2), model.lm_head(model.model.norm(hidden))) < 1e-5


def test_only_plain_left_padding_has_a_first_slot() -> None:
    def slots(*rows: list[int]) -> list[int] | None:
        found = first_slots(torch.tensor(rows), batch=len(rows))
        return None if found is None else found.tolist()

    assert slots([0, 0, 1], [1, 1, 1]) == [2, 0]
    assert slots([1, 0, 1]) is None
    assert slots([1, 1, 0]) is None
    assert first_slots(torch.ones(1, 1, 3, 3), batch=1) is None
    assert first_slots(None, batch=2).tolist() == [0, 0]  # type: ignore[union-attr]


def test_models_outside_the_kernels_are_named_with_the_reason() -> None:
    assert supports(GemmaConfig()) == "there is no native kernel for gemma"
    assert "gelu" in str(supports(LlamaConfig(**SIZES | {"hidden_act": "gelu"})))
    assert "512" in str(supports(LlamaConfig(**SIZES | {"head_dim": 512})))
    mixed = make_model()
    mixed.model.norm.to(torch.bfloat16)
    assert "mixes" in str(supports_weights([mixed]))
    assert "float32" in str(supports_weights([make_model(dtype=torch.float64)]))
