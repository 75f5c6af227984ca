"""Moving a step's tensors between devices, on a machine that may have only one."""

from pathlib import Path

import pytest
import torch
from parity import assert_same, model_step, reference_model, some_cut, trace
from torch import nn

from plans.errors import MachineError, UsageError
from runtime import load
from runtime.reading.devices import torch_device
from runtime.stages.hops import Hop

CPU, META = torch.device("cpu"), torch.device("meta")


class Layer(nn.Module):
    """Records what it was called with."""

    def forward(self, hidden: torch.Tensor, **shared: object) -> torch.Tensor:
        self.hidden, self.shared = hidden, shared
        return hidden


def test_hidden_states_and_shared_tensors_arrive_on_the_stages_device() -> None:
    layers = [Layer(), Layer()]
    Hop(META).install(layers)
    cache, rotary = object(), (torch.ones(2), torch.zeros(2))
    hidden = torch.ones(1, 2, 3)
    for layer in layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, past_key_values=cache, use_cache=True)
    for layer in layers:
        assert layer.hidden.device == META
        assert [table.device for table in layer.shared["position_embeddings"]] == [META, META]
        assert layer.shared["attention_mask"] is None
        assert layer.shared["past_key_values"] is cache
        assert layer.shared["use_cache"] is True


def test_shared_tensors_are_copied_once_per_step_and_again_in_the_next() -> None:
    layers = [Layer(), Layer()]
    Hop(META).install(layers)
    mask = torch.ones(2)
    copies = [layer.shared["mask"] for _ in range(2) for layer in layers if layer(torch.ones(1), mask=mask) is not None]
    assert copies[0] is copies[1]
    assert copies[2] is copies[3]
    assert copies[0] is not copies[2]


def test_hooked_stages_compute_the_same(tiny: Path) -> None:
    chain = load(tiny, stages=some_cut(4, 3, seed=6))
    for index in range(3):
        Hop(CPU).install(chain.stage_modules(index))
    expected = trace(model_step(reference_model(tiny, dtype=torch.float32)), vocab_size=97, num_tokens=4)
    assert_same(expected, trace(model_step(chain), vocab_size=97, num_tokens=4))


def test_a_chain_on_one_device_has_no_hooks_at_all(tiny: Path) -> None:
    chain = load(tiny, stages=some_cut(4, 3, seed=6))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in chain.modules())
    assert not hasattr(chain, "hf_device_map")


def test_a_chain_over_several_devices_refuses_to_be_moved_as_one(tiny: Path) -> None:
    chain = load(tiny, stages=some_cut(4, 2, seed=2))
    chain.stage_devices = (CPU, META)
    with pytest.raises(UsageError, match="placed one by one"):
        chain.to("cpu")
    chain.stage_devices = (CPU, CPU)
    assert chain.to(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["cpu", "cpu#3", "cpu:0", "box1/cpu#0"])
def test_every_name_of_the_cpu_is_the_cpu(name: str) -> None:
    assert torch_device(name) == CPU


def test_a_device_that_is_not_here_is_named_with_those_that_are() -> None:
    with pytest.raises(MachineError, match="device cuda:99 is not on this machine; expected cpu"):
        torch_device("cuda:99")
    with pytest.raises(UsageError, match="rtx-4090 is not a device torch knows; expected cpu"):
        torch_device("rtx-4090")
