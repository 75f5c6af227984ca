"""Bytes a decode step must read, and how fast this machine reads them: what decoding is measured against."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from runtime.reading.devices import synchronize
from runtime.stages.chain import Chain
from runtime.stages.stage import Stage


def decode_read_bytes(chain: Chain, index: int, *, batch_size: int) -> int:
    """Return the weight bytes one stage reads in a decode step.

    An embedding reads one row per sequence, a layer with experts those that its tokens are expected to choose; the
    cache is not counted.
    """
    stage = chain.stages[index]
    modules = chain.stage_modules(index)
    read = modules[1:] if stage.has_embedding else modules
    return _read_bytes(chain, read, has_embedding=stage.has_embedding, batch_size=batch_size)


def stage_read_bytes(stage: Stage, *, batch_size: int) -> int:
    """Return what `decode_read_bytes` returns, for a stage that stands alone."""
    model: Any = stage.model
    head = [model.base_model.norm, model.lm_head] if stage.spec.has_head else []
    read = [*model.base_model.layers, *head]
    return _read_bytes(model, read, has_embedding=stage.spec.has_embedding, batch_size=batch_size)


def _read_bytes(model: PreTrainedModel, read: Iterable[nn.Module], *, has_embedding: bool, batch_size: int) -> int:
    embedded = batch_size * model.config.hidden_size * model.dtype.itemsize if has_embedding else 0
    share = _expert_share(model.config, batch_size)
    return embedded + int(sum(_module_bytes(module, share) for module in read))


def _expert_share(config: PreTrainedConfig, batch_size: int) -> float:
    num_experts = getattr(config, "num_local_experts", None)
    if not num_experts:
        return 1.0
    missed: float = (1 - config.num_experts_per_tok / num_experts) ** batch_size
    return 1 - missed


def _module_bytes(module: nn.Module, expert_share: float) -> float:
    return sum(
        parameter.numel() * parameter.element_size() * (expert_share if ".experts." in f".{name}" else 1.0)
        for name, parameter in module.named_parameters()
    )


def read_bandwidth(chain: Chain, *, repeats: int) -> dict[str, float]:
    """Measure how fast each device of the chain reads its own weights, one after the other.

    Every weight is summed up as 64-bit integers, which costs less than reading it. The best of `repeats` passes
    counts, after one that is not timed (it brings mapped files into memory).

    Returns:
        Device name -> bytes per second.
    """
    rates = {}
    for device in dict.fromkeys(chain.stage_devices):
        stages = [index for index, place in enumerate(chain.stage_devices) if place == device]
        words = _words(module for index in stages for module in chain.stage_modules(index))
        _read_once(words, device)
        seconds = min(_read_once(words, device) for _ in range(repeats))
        rates[str(device)] = sum(word.nbytes for word in words) / seconds
    return rates


def _words(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    weights = {weight.data_ptr(): weight.detach() for module in modules for weight in module.parameters()}
    flat = [weight.reshape(-1) for weight in weights.values() if weight.is_contiguous()]
    return [tensor.view(torch.int64) for tensor in flat if tensor.nbytes % 8 == 0 and tensor.data_ptr() % 8 == 0]


@torch.inference_mode()
def _read_once(words: list[torch.Tensor], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    for word in words:
        word.sum()
    synchronize(device)
    return time.perf_counter() - started
