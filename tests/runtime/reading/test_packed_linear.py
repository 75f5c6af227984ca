"""A packed layer computes what compressed-tensors unpacks, and never holds more than its file."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from packed_checkpoints import edit_config, pack, pack_checkpoint, projections, quantization_scheme
from parity import CPU, as_stage, assert_same, model_step, reference_model, save_model, trace
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, LlamaConfig

from plans.checkpoint.folder import open_checkpoint
from plans.errors import InputError
from plans.packed.config import read_packing
from plans.packed.scheme import INT4, INT8, PACKED_PARTS, Scheme, is_linear
from runtime import load
from runtime.prepared import unpacking_remarks
from runtime.reading.families import CAUSAL_LM_CLASSES, build_skeleton, family_class, parse_model_config
from runtime.reading.packed import PackedLinear
from runtime.reading.tensors import FolderTensors
from runtime.stages.stage import build_stage

SCHEMES = [INT4, INT8, Scheme(4, 128), Scheme(8, 64), Scheme(4, None), Scheme(8, None)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OUT, IN = 40, 256


def packed_layer(scheme: Scheme, parts: dict[str, torch.Tensor]) -> PackedLinear:
    layer = PackedLinear(nn.Linear(IN, OUT, bias=False, device="meta"), scheme)
    for part, tensor in parts.items():
        assert tensor.shape == getattr(layer, part).shape
        setattr(layer, part, nn.Parameter(tensor, requires_grad=False))
    return layer


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.words)
def test_weights_are_unpacked_as_compressed_tensors_unpacks_them(
    scheme: Scheme, dtype: torch.dtype, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.reading.packed._VALUES_AT_ONCE", 7 * IN)  # so that rows are left over
    parts = pack(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3)), scheme, scale_dtype=stored)
    as_loaded = parts | {"weight_scale": parts["weight_scale"].to(dtype)}  # as transformers loads a scale
    expected = PackedQuantizationCompressor.decompress(as_loaded, quantization_scheme(scheme))["weight"]
    layer, inputs = packed_layer(scheme, parts), torch.randn(2, 3, IN).to(dtype)
    assert expected.dtype == dtype
    assert torch.equal(layer.unpack(dtype), expected)
    assert torch.equal(layer(inputs), nn.functional.linear(inputs, expected))


@pytest.mark.parametrize("bits", [4, 8])
def test_every_number_that_fits_is_unpacked_as_itself(bits: int) -> None:
    numbers = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float32).repeat(1, IN // 2**bits)
    scheme = Scheme(8 if bits == 8 else 4, None)
    parts = pack(numbers.expand(OUT, -1), scheme)
    parts["weight_scale"] = torch.ones(OUT, 1)
    parts["weight_packed"] = PackedQuantizationCompressor.compress(
        {"weight": numbers.expand(OUT, -1).contiguous(), "weight_scale": parts["weight_scale"]},
        quantization_scheme(scheme),
    )["weight_packed"]
    assert torch.equal(packed_layer(scheme, parts).unpack(torch.bfloat16).float(), numbers.expand(OUT, -1))


def test_packed_weights_stay_mapped_before_and_after_a_step(packed_shipped: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(packed_shipped("mixed"))
    config = parse_model_config(checkpoint.config.raw)
    whole = as_stage(0, 9, num_layers=7)
    stage = build_stage(config, whole, FolderTensors(checkpoint), dtype=torch.bfloat16, device=CPU)
    with torch.inference_mode():
        stage(torch.tensor([[1, 2, 3]]))
    held = dict(stage.model.named_parameters())
    assert set(held) == set(checkpoint.tensors)
    spans = _mapped_spans()
    for name, parameter in held.items():
        assert any(low <= parameter.data_ptr() < high for low, high in spans), name


def _mapped_spans() -> list[tuple[int, int]]:
    rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("safetensors")]
    return [tuple(int(edge, 16) for edge in row[0].split("-")) for row in rows]  # type: ignore[misc]


def test_every_linear_layer_of_every_family_is_known_by_its_name() -> None:
    for model_type in CAUSAL_LM_CLASSES:
        config = AutoConfig.for_model(model_type, num_hidden_layers=1, pad_token_id=0)
        model = build_skeleton(config, family_class(model_type))
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert linears == {name for name, _ in model.named_modules() if is_linear(name)}, model_type


def test_biases_groups_of_128_and_scales_of_another_dtype_run_as_in_transformers(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    plain = save_model(config, tmp_path / "plain", dtype=torch.bfloat16)
    packed = pack_checkpoint(
        plain, tmp_path / "packed", scheme_of=projections(Scheme(4, 128)), scale_dtype=torch.float16
    )
    expected = trace(model_step(reference_model(packed, dtype=torch.bfloat16)), vocab_size=97, num_tokens=8)
    assert_same(expected, trace(model_step(load(packed)), vocab_size=97, num_tokens=8))


def test_a_device_without_kernels_for_packed_weights_is_remarked() -> None:
    packing = read_packing(
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
         "quantization_status": "compressed", "config_groups": {"g": {"targets": ["Linear"], "weights": {
             "num_bits": 4, "group_size": 32, "strategy": "group"}}}}}
    )  # fmt: skip
    (said,) = unpacking_remarks(packing, [CPU, torch.device("cuda:0")])
    assert "int4 g32 weights are unpacked at every step on cuda:0" in said
    assert "--for vllm" in said
    assert unpacking_remarks(packing, [CPU]) == unpacking_remarks(None, [torch.device("cuda:0")]) == ()


# --- what cannot be right is refused by its name, before anything is computed -----------------------------------------

UP = "model.layers.2.mlp.up_proj"
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]


def with_value(part: str, value: float) -> Change:
    return lambda tensors: tensors[f"{UP}.{part}"].view(-1)[5].fill_(value)


def replaced(part: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({f"{UP}.{part}": make(tensors[f"{UP}.{part}"])})


def plain(tensors: Tensors) -> None:
    for part in PACKED_PARTS:
        del tensors[f"{UP}.{part}"]
    tensors[f"{UP}.weight"] = torch.zeros(512, 192)


WRONG: dict[str, tuple[Change, str]] = {
    "no scale": (lambda t: t.pop(f"{UP}.weight_scale"), r"missing for .*: UP\.weight_scale"),
    "no numbers": (lambda t: t.pop(f"{UP}.weight_packed"), r"missing for .*: UP\.weight_packed"),
    "plain weights": (plain, r"3 tensors missing for .*: UP\.weight_packed"),
    "zero points": (lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(64, 6)}), r"UP\.weight_zero_point"),
    "act-order": (lambda t: t.update({f"{UP}.weight_g_idx": torch.zeros(192)}), r"UP\.weight_g_idx"),
    "a NaN": (with_value("weight_scale", float("nan")), r"UP\.weight_scale holds nan in row 0, group 5"),
    "an infinity": (with_value("weight_scale", float("inf")), r"UP\.weight_scale holds inf in row 0, group 5"),
    "too few scales": (replaced("weight_scale", lambda s: s[:, 1:].clone()), r"UP\.weight_scale has shape \[512, 5\]"),
    "too few rows": (replaced("weight_packed", lambda p: p[1:].clone()), r"UP\.weight_packed has shape \[511, 24\]"),
    "another shape said": (replaced("weight_shape", lambda s: s + 1), r"UP\.weight_shape says \[513, 193\]"),
    "scales of integers": (replaced("weight_scale", lambda s: s.int()), r"UP\.weight_scale is stored as torch\.int32"),
    "numbers of floats": (replaced("weight_packed", lambda p: p.float()), r"UP\.weight_packed is stored as"),
}


@pytest.mark.row("P22")
@pytest.mark.parametrize("what", WRONG)
def test_a_packed_layer_that_cannot_be_right_is_refused_by_its_name(
    what: str, packed_shipped: Callable[[str], Path]
) -> None:
    change, message = WRONG[what]
    folder = packed_shipped("int4")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    config = parse_model_config(open_checkpoint(folder).config.raw)
    with pytest.raises(InputError, match=message.replace("UP", re.escape(UP))):
        build_stage(config, as_stage(3, 4, num_layers=7), tensors, dtype=torch.bfloat16, device=CPU)


def test_scales_that_overflow_in_the_models_dtype_are_refused(packed_shipped: Callable[[str], Path]) -> None:
    folder = packed_shipped("int4")
    tensors = load_file(folder / "model.safetensors")
    with_value("weight_scale", 1e6)(tensors)
    config = parse_model_config(open_checkpoint(folder).config.raw)
    with pytest.raises(
        InputError, match=rf"{UP}\.weight_scale holds inf in row 0, group 5; expected finite .* float16"
    ):
        build_stage(config, as_stage(3, 4, num_layers=7), tensors, dtype=torch.float16, device=CPU)


@pytest.mark.row("P22")
def test_a_group_that_does_not_divide_the_columns_names_the_layer(packed_shipped: Callable[[str], Path]) -> None:
    raw = dict(open_checkpoint(packed_shipped("int4 g64")).config.raw)
    raw["quantization_config"] = {
        **raw["quantization_config"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "group_size": 128, "strategy": "group"}}},
    }  # fmt: skip
    config = parse_model_config(raw)
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.q_proj has 192 columns, which int4 g128"):
        build_skeleton(config, family_class("llama"))


def test_a_tied_head_that_is_said_to_be_packed_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    packed = pack_checkpoint(save_model(config, tmp_path / "a"), tmp_path / "b", scheme_of=projections(INT8))
    table = open_checkpoint(packed).config.raw["quantization_config"]
    edit_config(packed, quantization_config=table | {"ignore": []})
    with pytest.raises(InputError, match="lm_head shares the table of the embedding and is said to be int8 g32"):
        load(packed)
