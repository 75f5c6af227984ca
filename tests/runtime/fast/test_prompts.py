"""Prompts: torch's products, or matrix tiles, with native code between them, against transformers itself."""

from typing import Any

import pytest
import torch
from test_fast import CONFIGS, VOCAB_SIZE, Run, distance, make_model, prompt
from torch import nn
from transformers import DynamicCache

from runtime.fast.cache import FastLayer
from runtime.fast.model import FastModel
from runtime.fast.native import MAX_ROWS, Library
from runtime.fast.products import Products
from runtime.fast.setup import whole
from runtime.fast.speed import Choice

PROMPTS_BY_TORCH = Choice(((MAX_ROWS, 2), (MAX_ROWS + 1, 0)))


def reader(model: Any, kernels: Library, choice: Choice = PROMPTS_BY_TORCH) -> FastModel:
    return whole(model, kernels, choice)


def read(fast: FastModel, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits [B, S, V] of new tokens, in fp32."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    logits = fast.step(ids, attention_mask=mask, position_ids=positions, cache=cache, logits_to_keep=0)
    assert logits is not None
    return logits.float()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_in_pieces_gives_the_logits_and_the_cache_of_transformers(
    name: str, batch: int, kernels: Library
) -> None:
    model = make_model(name)
    expected, cache = Run(model), DynamicCache(config=model.config)
    fast = reader(model, kernels)
    ids, mask = prompt(batch, length=60)
    for start, end in ((0, 22), (22, 43), (43, 60)):
        piece = ids[:, start:end], mask[:, :end]
        found, wanted = read(fast, *piece, cache), expected.step(*piece)
        is_token = mask[:, start:end, None].bool()
        assert distance(found * is_token, wanted * is_token) < 1e-5
    for layer, (keys, values) in zip(cache.layers, filled(expected.cache), strict=True):
        assert isinstance(layer, FastLayer)
        seen = slice(-keys.shape[2], None)  # transformers keeps a sliding window's last tokens alone
        assert layer.keys is not None
        assert layer.values is not None
        is_token = mask[:, None, seen, None].bool()
        assert distance(layer.keys[:, :, seen] * is_token, keys * is_token) < 1e-5
        assert distance(layer.values[:, :, seen] * is_token, values * is_token) < 1e-5


def filled(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers if layer.keys is not None and layer.values is not None]


@pytest.mark.parametrize("name", ["3 heads per key, long rows", "biases, nothing a multiple of 16", "phi3", "granite"])
def test_a_prompt_of_bf16_is_as_near_to_fp32_as_transformers_is(name: str, kernels: Library) -> None:
    ids, mask = prompt(2, length=40)
    exact = Run(make_model(name)).step(ids, mask)
    model = make_model(name, dtype=torch.bfloat16)
    found = read(reader(model, kernels), ids, mask, DynamicCache(config=model.config))
    is_token = mask[..., None].bool()
    theirs = distance(Run(model).step(ids, mask) * is_token, exact * is_token)
    assert distance(found * is_token, exact * is_token) < 1.5 * theirs


def test_steps_go_on_where_a_prompt_ended(kernels: Library) -> None:
    model = make_model("mistral window")
    fast, expected, cache = reader(model, kernels), Run(model), DynamicCache(config=model.config)
    ids, mask = prompt(1, length=30)
    read(fast, ids, mask, cache)
    expected.step(ids, mask)
    for token in range(5, 9):
        ids, mask = torch.tensor([[token]]), nn.functional.pad(mask, (0, 1), value=1)
        assert distance(read(fast, ids, mask, cache), expected.step(ids, mask)) < 1e-5


def test_no_layer_of_transformers_runs_where_there_are_kernels(kernels: Library) -> None:
    model = make_model()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: pytest.fail("a layer of transformers ran"))
    ids, mask = prompt(1, length=30)
    for choice in (PROMPTS_BY_TORCH, Choice(((1000, 2),)), Choice(((1000, 0),))):
        cache = DynamicCache(config=model.config)
        assert read(reader(model, kernels, choice), ids, mask, cache).shape == (1, 30, VOCAB_SIZE)
        assert cache.get_seq_length() == 30


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("outputs", [(64,), (96, 32, 32), (50, 7)])
@pytest.mark.parametrize("rows", [17, 32, 70])
def test_layers_with_the_same_inputs_give_what_each_gives_alone(
    rows: int, outputs: tuple[int, ...], has_bias: bool, kernels: Library
) -> None:
    torch.manual_seed(3)
    layers = [nn.Linear(160, count, bias=has_bias, dtype=torch.bfloat16) for count in outputs]
    inputs = torch.randn(1, rows, 160, dtype=torch.bfloat16)
    with torch.no_grad():
        found = Products(kernels).linears(layers, inputs)
        for layer, result in zip(layers, found, strict=True):
            exact = layer.float()(inputs.float())
            assert result.shape == exact.shape
            assert (result.float() - exact).abs().max() <= 2**-8 * exact.abs().max()
