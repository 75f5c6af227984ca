"""What is gathered of a text for the matrices of a layer."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from exporter.calibrate.layers import Layers, States, linear_modules
from plans.checkpoint.folder import open_checkpoint
from runtime.reading.families import parse_model_config
from runtime.reading.tensors import FolderTensors

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
PROJECTIONS = (*ATTENTION, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [f"model.layers.0.{name}" for name in PROJECTIONS]


@pytest.fixture
def layers(models: Callable[..., Path]) -> Iterator[Layers]:
    checkpoint = open_checkpoint(models(hidden_size=64, intermediate_size=96, num_attention_heads=2))
    config = parse_model_config(checkpoint.config.raw)
    with Layers.of(config, FolderTensors(checkpoint), num_threads=2) as found, torch.inference_mode():
        yield found


@pytest.fixture
def states(layers: Layers) -> States:
    return layers.embed([range(start, start + 40) for start in (1, 11, 21)])


def test_modules_with_one_input_are_together_in_the_order_they_run(layers: Layers, states: States) -> None:
    stage = layers.load(0)
    originals, outputs = layers.originals_of(stage, linear_modules(stage, 0, NAMES), states)
    assert [len(original.modules) for original in originals] == [3, 1, 2, 1]
    assert sum((original.modules for original in originals), ()) == tuple(NAMES)
    assert [original.inputs[0].shape for original in originals] == [(40, n) for n in (64, 64, 64, 96)]
    assert all(map(torch.equal, outputs, layers.run(stage, states)))


def test_inputs_come_out_of_what_is_packed_before_and_miss_what_the_original_has(
    layers: Layers, states: States
) -> None:
    stage = layers.load(0)
    modules = linear_modules(stage, 0, NAMES)
    originals, _ = layers.originals_of(stage, modules, states)
    for original in originals:  # nothing is packed
        inputs = layers.inputs_of(stage, modules[original.modules[0]], states, original)
        own = torch.cat(original.inputs).double()
        torch.testing.assert_close(inputs.hessian, own.t() @ own, rtol=1e-4, atol=1e-5)
        assert not inputs.missing.any()
    modules[NAMES[2]].weight = torch.nn.Parameter(modules[NAMES[2]].weight / 2, requires_grad=False)
    output = layers.inputs_of(stage, modules[NAMES[3]], states, originals[1])
    own = torch.cat(originals[1].inputs).double()
    torch.testing.assert_close(output.hessian, own.t() @ own / 4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.missing, own.t() @ own / 4, rtol=1e-4, atol=1e-5)
