"""Random small Llamas, made by transformers, against their cuts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import CPU, assert_same, model_step, reference_model, some_cut, stages_step, trace
from safetensors.torch import load_file
from transformers import LlamaConfig, PreTrainedConfig

from plans.reading.strict import read_json
from runtime import load
from runtime.reading.families import parse_model_config
from runtime.stages.stage import build_stage

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {"num_hidden_layers": 4},
    "one kv head": {"num_hidden_layers": 5, "num_key_value_heads": 1},
    "no grouping": {"num_hidden_layers": 4, "num_key_value_heads": 4},
    "tied head": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "biases": {"num_hidden_layers": 4, "attention_bias": True, "mlp_bias": True},
    "own head_dim": {"num_hidden_layers": 6, "head_dim": 12},
    "llama3 rope": {"num_hidden_layers": 4, "rope_parameters": LLAMA3},
    "linear rope": {
        "num_hidden_layers": 4,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    },
    "yarn rope": {"num_hidden_layers": 5, "rope_parameters": YARN},
    "proportional rope": {
        "num_hidden_layers": 4,
        "rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "everything": {
        "num_hidden_layers": 6,
        "head_dim": 10,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3,
    },
    # Dynamic rope recomputes its table while the sequence outgrows the trained length.
    "dynamic rope": {
        "num_hidden_layers": 4,
        "max_position_embeddings": 20,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    },
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuts_of_a_random_llama_equal_the_unsplit_model(
    variant: str, dtype: str, make_checkpoint: Callable[[PreTrainedConfig], Path]
) -> None:
    config = LlamaConfig(**SMALL | VARIANTS[variant])
    folder = make_checkpoint(config)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    reference = reference_model(folder, dtype=torch_dtype)
    expected = trace(model_step(reference), vocab_size=97, num_tokens=64)
    tensors = load_file(folder / "model.safetensors")
    seed = list(VARIANTS).index(variant)
    chain = load(folder, stages=some_cut(config.num_hidden_layers, 2, seed=3 * seed), dtype=dtype)
    assert_same(expected, trace(model_step(chain), vocab_size=97, num_tokens=64))
    cut = some_cut(config.num_hidden_layers, 3, seed=5 * seed)
    stages = [build_stage(config, spec, tensors, dtype=torch_dtype, device=CPU) for spec in cut]
    assert_same(expected, trace(stages_step(stages), vocab_size=97, num_tokens=64))


def test_unpadded_batches_take_the_kernel_without_a_mask(tiny: Path) -> None:
    expected = trace(
        _without_mask(reference_model(tiny, dtype=torch.float32)), vocab_size=97, num_tokens=8, padded=False
    )
    chain = load(tiny, stages=some_cut(4, 3, seed=5))
    assert_same(expected, trace(_without_mask(chain), vocab_size=97, num_tokens=8, padded=False))


def _without_mask(model: Any) -> Any:
    step = model_step(model)
    return lambda ids, _mask, positions: step(ids, None, positions)  # type: ignore[arg-type]


def test_both_spellings_of_rotary_settings_are_read(tiny: Path, tmp_path: Path) -> None:
    modern = read_json(tiny / "config.json")
    modern["rope_parameters"] = {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}
    older = {key: value for key, value in modern.items() if key != "rope_parameters"}
    older |= {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert modern["rope_parameters"].items() <= parse_model_config(older).rope_parameters.items()
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(older))
    reference = reference_model(tmp_path, dtype=torch.float32)
    expected = trace(model_step(reference), vocab_size=97, num_tokens=4)
    assert_same(expected, trace(model_step(load(tmp_path, stages=some_cut(4, 2, seed=1))), vocab_size=97, num_tokens=4))
