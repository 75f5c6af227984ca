"""Fixtures shared by the runtime's tests."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import model_step, reference_model, save_model, trace
from transformers import LlamaConfig, PreTrainedConfig
from transformers.utils import logging

from runtime.fast.native import Library
from runtime.fast.native import load as load_kernels

SHIPPED = Path(__file__).parents[1] / "checkpoint" / "python-llama"

logging.disable_progress_bar()
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The trained checkpoint of the repository: 7 layers, bf16, untied head, several shards."""
    return SHIPPED


@pytest.fixture(scope="session")
def shipped_reference() -> Callable[[torch.dtype], Any]:
    """The shipped checkpoint as transformers loads it, once per dtype."""
    return cache(lambda dtype: reference_model(SHIPPED, dtype=dtype))


@pytest.fixture(scope="session")
def shipped_trace(shipped_reference: Callable[[torch.dtype], Any]) -> Callable[[torch.dtype], list[torch.Tensor]]:
    """What the unsplit shipped checkpoint computes in the parity protocol, once per dtype."""

    def compute(dtype: torch.dtype) -> list[torch.Tensor]:
        model = shipped_reference(dtype)
        return trace(model_step(model), vocab_size=model.config.vocab_size, num_tokens=64)

    return cache(compute)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PreTrainedConfig], Path]:
    """Write a random checkpoint for a configuration."""
    return lambda config: save_model(config, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def tiny_config() -> LlamaConfig:
    """Four layers with grouped queries, biases, and a head_dim that is not hidden / heads."""
    return LlamaConfig(
        hidden_size=36,
        intermediate_size=56,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        vocab_size=97,
        max_position_embeddings=256,
        attention_bias=True,
        mlp_bias=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.fixture(scope="session")
def tiny(make_checkpoint: Callable[[PreTrainedConfig], Path], tiny_config: LlamaConfig) -> Path:
    """A checkpoint of `tiny_config`."""
    return make_checkpoint(tiny_config)


@pytest.fixture(scope="session")
def kernels() -> Library:
    """The compiled decode kernels, built if this machine has none yet."""
    found = load_kernels()
    assert isinstance(found, Library), found.reason
    return found
