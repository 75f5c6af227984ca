"""Packed weights on the kernels against the reference path that unpacks them, on random models."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fast import MAX_ROWS, Run, compare, distance, fast_model, make_model
from torch import nn
from transformers import AutoModelForCausalLM as Auto
from transformers import DynamicCache, GemmaConfig

from plans.native.building import Unavailable
from plans.packed.scheme import INT4, INT8, Scheme
from plans.stages import StageRange
from runtime.fast.kernels import supports_weights
from runtime.fast.native import Library
from runtime.fast.products import Products, attach, packed_layers
from runtime.fast.setup import set_up
from runtime.fast.speed import Speed
from runtime.reading.packed import PackedLinear

BOTH = pytest.mark.parametrize("scheme", [INT4, INT8], ids=lambda scheme: scheme.words)
OTHERS = [Scheme(4, 64), Scheme(8, 128), Scheme(4, None), Scheme(8, None)]
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
}
SIZES = {"hidden_size": 576, "intermediate_size": 1056, "num_attention_heads": 9, "num_key_value_heads": 3}


def pack(linear: nn.Linear, scheme: Scheme, *, scale_dtype: torch.dtype) -> PackedLinear:
    """The layer with its weights rounded to whole numbers."""
    weight, bits = linear.weight.detach().double(), scheme.bits
    grouped = weight.view(len(weight), scheme.num_groups(weight.shape[1]), -1)
    scale = (grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)).to(scale_dtype)  # [O, G]
    numbers = (grouped / scale.double()[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    data = (numbers.view_as(weight) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        data = data[:, ::2] | data[:, 1::2] << 4
    packed = PackedLinear(linear, scheme)
    packed.weight_packed = nn.Parameter(data.contiguous().view(torch.int32), requires_grad=False)
    packed.weight_scale = nn.Parameter(scale, requires_grad=False)
    packed.weight_shape = nn.Parameter(torch.tensor(weight.shape), requires_grad=False)
    return packed


def packed_model(
    name: str = "llama",
    *,
    scheme_of: Callable[[str], Scheme | None],
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> Any:
    """A random model of which some linear layers are packed."""
    model = make_model(name, dtype=dtype, **sizes)
    for module_name, module in list(model.named_modules()):
        scheme = scheme_of(module_name) if isinstance(module, nn.Linear) else None
        if scheme is not None and scheme.can_pack(*module.weight.shape):
            model.set_submodule(module_name, pack(module, scheme, scale_dtype=dtype))
    return model


def exact(model: Any) -> Any:
    """The model in fp64, with weights that are exactly number x scale."""
    model = copy.deepcopy(model).double()
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight = nn.Parameter(module.unpack(torch.float64))
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model


@pytest.mark.parametrize("scheme", [INT4, INT8, *OTHERS], ids=lambda scheme: scheme.words)
def test_fp32_logits_are_those_of_unpacked_weights(scheme: Scheme, kernels: Library) -> None:
    model = packed_model(scheme_of=lambda _: scheme, hidden_size=128, intermediate_size=896, num_hidden_layers=2)
    expected, found = compare([Run(model), Run(model, kernels)], batch=3, steps=4)
    assert max(map(distance, found, expected)) < 1e-5


@BOTH
@pytest.mark.parametrize("name", ["phi3", "qwen2", "granite"])
def test_other_families_are_those_of_unpacked_weights(name: str, scheme: Scheme, kernels: Library) -> None:
    model = packed_model(name, scheme_of=lambda _: scheme, hidden_size=64, intermediate_size=96)
    expected, found = compare([Run(model), Run(model, kernels)], batch=2, steps=3)
    assert max(map(distance, found, expected)) < 1e-5


def test_every_linear_may_be_packed_in_its_own_way(kernels: Library) -> None:
    ways = {"q_proj": INT4, "v_proj": INT8, "o_proj": INT8, "up_proj": INT4, "down_proj": INT4, "lm_head": INT8}
    model = packed_model(scheme_of=lambda name: ways.get(name.rpartition(".")[2]), num_hidden_layers=2, **SIZES)
    expected, found = compare([Run(model), Run(model, kernels)], batch=5, steps=2)
    assert max(map(distance, found, expected)) < 1e-5


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_farther_from_the_truth_than_unpacked_weights(
    dtype: torch.dtype, scheme: Scheme, kernels: Library
) -> None:
    model = packed_model(scheme_of=lambda _: scheme, dtype=dtype, **SIZES)
    truth, expected, found = compare([Run(exact(model)), Run(model), Run(model, kernels)], batch=5, steps=6)
    own = sum(float((a - b).square().sum()) for a, b in zip(found, truth, strict=True)) ** 0.5
    reference = sum(float((a - b).square().sum()) for a, b in zip(expected, truth, strict=True)) ** 0.5
    assert own < 1.2 * reference


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype, scheme: Scheme, kernels: Library) -> None:
    model = packed_model(scheme_of=lambda _: scheme, dtype=dtype, num_hidden_layers=2, **SIZES)
    ids, positions = torch.arange(3, 3 + MAX_ROWS)[:, None], torch.full((MAX_ROWS, 1), 5)
    fast = fast_model(model, kernels)

    def logits(rows: slice) -> torch.Tensor:
        cache = DynamicCache()
        found = fast.step(ids[rows], attention_mask=None, position_ids=positions[rows], cache=cache)
        assert found is not None
        return found

    together = logits(slice(MAX_ROWS))
    for rows in (slice(0, 1), slice(1, 3), slice(3, 6), slice(6, 13)):
        assert torch.equal(logits(rows), together[rows])


def test_numbers_that_are_not_finite_stay_so(kernels: Library) -> None:
    model = packed_model(scheme_of=lambda _: INT4)
    model.model.embed_tokens.weight.data[7, 3] = torch.inf
    found = fast_model(model, kernels).step(
        torch.tensor([[7], [8]]), attention_mask=None, position_ids=None, cache=DynamicCache()
    )
    assert found is not None
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_groups_that_are_no_multiple_of_32_are_left_to_the_reference_path() -> None:
    model = packed_model(scheme_of=lambda _: Scheme(4, 16))
    reason = supports_weights([*model.model.layers])
    assert reason == "the native kernels take a multiple of 32 columns to a scale; here are 16"


@pytest.mark.parametrize("rows", [1, 3, MAX_ROWS, MAX_ROWS + 1, 70])
@pytest.mark.parametrize("scheme", [INT4, INT8, *OTHERS], ids=lambda scheme: scheme.words)
def test_a_layer_alone_gives_what_its_unpacked_weights_give(scheme: Scheme, rows: int, kernels: Library) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layer, inputs = _layer(scheme, dtype=dtype), torch.randn(2, rows, 640).to(dtype)[:1]
        with torch.no_grad():
            truth = nn.functional.linear(inputs.double(), layer.unpack(torch.float64), layer.bias.double())
            expected = layer(inputs)
            attach([layer], kernels)
            found = layer(inputs)
        assert found.shape == expected.shape
        if dtype != torch.float32:
            assert float((found - truth).norm()) < 1.2 * float((expected - truth).norm())
        assert distance(found.double(), truth) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("scheme", [INT4, INT8, *OTHERS], ids=lambda scheme: scheme.words)
def test_natively_unpacked_weights_are_those_of_the_reference_path(scheme: Scheme, kernels: Library) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layer = _layer(scheme, dtype=dtype)
        layer.bias = None
        with torch.no_grad():
            found = Products(kernels)(layer, torch.eye(640, dtype=dtype))
        assert found is not None
        assert torch.equal(found.T, layer.unpack(dtype))


def test_a_row_of_a_prompt_does_not_depend_on_the_rows_beside_it(kernels: Library) -> None:
    layer, inputs = _layer(INT4, dtype=torch.bfloat16), torch.randn(70, 640).bfloat16()
    attach([layer], kernels)
    with torch.no_grad():
        assert torch.equal(layer(inputs)[40:60], layer(inputs[40:60]))


def test_layers_of_a_family_without_kernels_are_native(kernels: Library) -> None:
    torch.manual_seed(0)
    config = GemmaConfig(**SMALL, head_dim=16)
    model: Any = Auto.from_config(config).eval()
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.layers.set_submodule(name, pack(module, INT8, scale_dtype=torch.float32))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = model(ids).logits
        found = set_up(model, [StageRange.whole(2)], [torch.device("cpu")], speed=Speed.MAX)
        assert isinstance(found, Unavailable)
        assert all(layer.product is not None for layer in packed_layers([model]))
        assert distance(model(ids).logits, expected) < 1e-5
        assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


def _layer(scheme: Scheme, *, dtype: torch.dtype) -> PackedLinear:
    torch.manual_seed(0)
    return pack(nn.Linear(640, 83).to(dtype), scheme, scale_dtype=dtype)
