"""Prompts: native products of many rows with torch's attention between them, against transformers itself."""

from typing import Any

import pytest
import torch
from test_fast import CONFIGS, VOCAB_SIZE, Run, distance, make_model, prompt
from torch import nn
from transformers import DynamicCache

from runtime.fast.cache import FastLayer
from runtime.fast.model import FastModel
from runtime.fast.native import DTYPES, MAX_ROWS, Library, Product
from runtime.fast.products import linear_addresses
from runtime.fast.setup import whole
from runtime.fast.speed import Choice

PROMPTS_LAYER_BY_LAYER = Choice(((MAX_ROWS, 2), (MAX_ROWS + 1, 0)))


def reader(model: Any, kernels: Library, choice: Choice = PROMPTS_LAYER_BY_LAYER) -> FastModel:
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
    for choice in (PROMPTS_LAYER_BY_LAYER, Choice(((1000, 2),)), Choice(((1000, 0),))):
        cache = DynamicCache(config=model.config)
        assert read(reader(model, kernels, choice), ids, mask, cache).shape == (1, 30, VOCAB_SIZE)
        assert cache.get_seq_length() == 30


def multiply(layer: nn.Linear, inputs: torch.Tensor, kernels: Library) -> torch.Tensor:
    """The kernels' product of rows [R, I] with a layer, [R, O]."""
    found = inputs.new_empty(len(inputs), layer.out_features)
    kernels.multiply_linear(
        Product(
            openmp=kernels.openmp_address,
            threads=2,
            dtype=DTYPES[inputs.dtype],
            rows=len(inputs),
            columns=layer.in_features,
            outputs=layer.out_features,
            inputs=inputs.data_ptr(),
            weight=linear_addresses(layer),
            result=found.data_ptr(),
        )
    )
    return found


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(160, 64), (96, 50), (1100, 7), (33, 129)])
@pytest.mark.parametrize("rows", [17, 32, 70])
def test_a_product_of_many_rows_is_exact_but_for_its_last_rounding(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, has_bias: bool, kernels: Library
) -> None:
    torch.manual_seed(3)
    layer, states = nn.Linear(inputs, outputs, bias=has_bias, dtype=dtype), torch.randn(rows, inputs).to(dtype)
    with torch.no_grad():
        found, exact = multiply(layer, states, kernels), layer.double()(states.double())
    unit = max(torch.finfo(dtype).eps, 2**-17)
    assert (found.double() - exact).abs().max() <= unit * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_row_s_product_does_not_depend_on_how_many_rows_are_beside_it(dtype: torch.dtype, kernels: Library) -> None:
    torch.manual_seed(4)
    layer, states = nn.Linear(640, 80, dtype=dtype), torch.randn(90, 640).to(dtype)
    together = multiply(layer, states, kernels)
    for first, count in ((0, 17), (5, 40), (73, 17), (1, 89)):
        assert torch.equal(multiply(layer, states[first : first + count], kernels), together[first : first + count])


def test_a_long_prompt_is_the_same_however_many_rows_a_call_takes(kernels: Library, monkeypatch: Any) -> None:
    model = make_model(dtype=torch.bfloat16)
    ids, mask = prompt(2, length=60)
    whole_prompt = read(reader(model, kernels), ids, mask, DynamicCache(config=model.config))
    monkeypatch.setattr("runtime.fast.passage.MANY_ROWS", 37)
    assert torch.equal(read(reader(model, kernels), ids, mask, DynamicCache(config=model.config)), whole_prompt)
