"""Stages on two devices, the second of them torch's meta device: it computes nothing but refuses to mix devices."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from parity import as_stage
from transformers import AutoConfig, DynamicCache, PreTrainedConfig

from runtime.reading.families import build_skeleton, family_class
from runtime.stages.chain import Chain, build_chain, install_hops

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0, "sliding_window": 4,
}  # fmt: skip

EDGES = {"embedding alone": (0, 1, 6), "in the middle": (0, 3, 6), "head alone": (0, 5, 6), "three": (0, 2, 4, 6)}
"""Unit numbers where stages begin and end; every stage but the first is on the second device."""


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2", "granite", "qwen3"])
def config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return AutoConfig.for_model(request.param, **SMALL)


def chain_over_two_devices(config: PreTrainedConfig, edges: Sequence[int]) -> Chain:
    skeleton = build_skeleton(config, family_class(config.model_type))
    tensors = {name: torch.zeros(p.shape) for name, p in skeleton.named_parameters()}
    specs = [as_stage(start, end, num_layers=4) for start, end in itertools.pairwise(edges)]
    # Nothing may be left on the meta device after loading, so the stages move there only afterwards.
    chain = build_chain(config, specs, tensors, dtype=torch.float32, devices=[CPU] * len(specs))
    chain.stage_devices = (CPU, *[META] * (len(specs) - 1))
    for index in range(1, len(specs)):
        for module in chain.stage_modules(index):
            module.to(META)
    install_hops(chain)
    return chain


@pytest.mark.parametrize("name", EDGES)
def test_every_operation_happens_on_its_stages_device(name: str, config: PreTrainedConfig) -> None:
    edges = EDGES[name]
    chain = chain_over_two_devices(config, edges)
    cache = DynamicCache(config=chain.config)
    with torch.inference_mode():
        for past, new in ((0, 5), (5, 3), (8, 1)):
            ids = torch.ones((2, new), dtype=torch.long)
            mask = torch.ones((2, past + new), dtype=torch.long)
            mask[0, :2] = 0
            outputs = chain(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
            assert outputs.logits.device == META
            assert outputs.logits.shape == (2, 1, 64)
    first_on_second_device = edges[1] - 1
    devices = [layer.keys.device for layer in cache.layers]
    assert devices == [CPU if index < first_on_second_device else META for index in range(4)]


def test_the_placement_is_told_to_transformers(config: PreTrainedConfig) -> None:
    chain = chain_over_two_devices(config, EDGES["three"])
    placement: Any = chain.hf_device_map
    assert set(placement.values()) == {CPU, META}
    assert chain.device == CPU
    assert not chain.is_on_one_device
    assert not chain._valid_auto_compile_criteria({}, chain.generation_config)


def test_without_hops_the_same_chain_fails(config: PreTrainedConfig) -> None:
    chain = chain_over_two_devices(config, EDGES["in the middle"])
    for module in chain.modules():
        module._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match="device"):
        chain(torch.ones((2, 3), dtype=torch.long))
