"""Keys and values kept in another dtype than the model computes in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from plans.stages import StageRange
from runtime import load
from runtime.prepared import prepare_session
from runtime.reading.opening import open_source
from runtime.session import load_session
from runtime.stages.caches import new_cache
from runtime.stages.chain import Chain
from tests.conftest import RunCommand

CUT = (
    StageRange("cpu", 0, 3, has_embedding=True, has_head=False),
    StageRange("cpu", 3, 7, has_embedding=False, has_head=True),
)
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def chain(shipped: Path) -> Chain:
    return load(shipped, stages=CUT, dtype="fp32")


def test_the_models_own_dtype_is_transformers_cache_as_it_is(chain: Chain) -> None:
    kinds = {type(layer).__name__ for cache in (new_cache(chain.config), chain.new_cache()) for layer in cache.layers}
    assert kinds == {"DynamicLayer"}


def test_slots_are_rounded_once_and_take_half_the_memory(chain: Chain) -> None:
    whole, halved = new_cache(chain.config), new_cache(chain.config, dtype=torch.bfloat16)
    with torch.inference_mode():
        chain(IDS, past_key_values=whole)
        chain(IDS, past_key_values=halved)
    for exact, kept in zip(whole.layers[:1], halved.layers[:1], strict=True):  # later layers see rounded values
        assert torch.equal(kept.keys, exact.keys.to(torch.bfloat16))
        assert torch.equal(kept.values, exact.values.to(torch.bfloat16))
        assert 2 * kept.keys.nbytes == exact.keys.nbytes


def test_decoding_reads_the_rounded_slots(chain: Chain, shipped: Path) -> None:
    """The chain in one go equals the chain token by token: both attend to rounded keys and values."""
    with torch.inference_mode():
        whole = chain(IDS, past_key_values=new_cache(chain.config, dtype=torch.bfloat16)).logits
        cache = new_cache(chain.config, dtype=torch.bfloat16)
        steps = [chain(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(IDS.shape[1])]
        exact = chain(IDS).logits
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=2e-2)
    assert not torch.equal(whole, exact)


def test_a_sliding_window_keeps_sliding() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=64, num_hidden_layers=2, sliding_window=8, dtype="float32", **sizes)
    torch.manual_seed(0)
    model: Any = MistralForCausalLM(config).eval()
    caches = new_cache(config), new_cache(config, dtype=torch.float64)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    exact, widened = (model.generate(IDS[:1, :6], past_key_values=cache, **options) for cache in caches)
    assert torch.equal(exact, widened)  # nothing is lost in a wider dtype
    assert caches[1].layers[0].keys.shape[2] == 7
    assert caches[1].layers[0].keys.dtype == torch.float64


def test_a_session_takes_the_plans_dtype_unless_told_otherwise(
    shipped: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    plan = tmp_path / "plan.json"
    solved = run_command(
        "llamaplan", "solve", shipped, "--dtype", "fp32", "--kv-cache-dtype", "bf16", "--device", "cpu=2GiB",
        "--ctx-size", 128, "--prompt-tokens", 64, "--new-tokens", 32, "-o", plan,
    )  # fmt: skip
    assert solved.code == 0, solved.err
    planned = json.loads(plan.read_text())["stages"][0]["kv_cache_bytes"]
    source = open_source(plan, model=shipped)
    for chosen, expected in ((None, torch.bfloat16), ("fp32", torch.float32)):
        session = load_session(prepare_session(source, device_map={}, kv_cache_dtype=chosen), speed="max")
        cache = session.chain.new_cache()
        with torch.inference_mode():
            session.chain(torch.zeros((1, 128), dtype=torch.long), past_key_values=cache)
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert cache.layers[0].keys.dtype == expected
        assert (kept == planned) == (chosen is None)
        assert (session.chain.fast is None) == (chosen is None)


def test_the_commands_take_the_option(shipped: Path, run_command: RunCommand) -> None:
    options = ["-p", "import os", "-n", 8, "--temp", 0, "--dtype", "fp32"]
    kept = run_command("llamarun", "generate", shipped, *options, "--kv-cache-dtype", "bf16")
    assert kept.code == 0, kept.err
    assert "the fast path keeps keys and values in the dtype it computes in" in kept.err
    assert run_command("llamarun", "generate", shipped, *options, "--kv-cache-dtype", "int3").code == 2
