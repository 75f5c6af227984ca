"""Every admitted family, with the features that make it differ from Llama, cut and compared with transformers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import CPU, assert_same, model_step, reference_model, some_cut, stages_step, trace
from transformers import AutoConfig, PreTrainedConfig

from plans.checkpoint.folder import open_checkpoint
from plans.config.config import SUPPORTED_FAMILIES
from plans.errors import InputError
from runtime import load
from runtime.engine.engine import Engine
from runtime.engine.heard import Heard
from runtime.engine.run import BareChain, generate
from runtime.generate.limits import Limits
from runtime.generate.request import Request
from runtime.generate.sampling import Sampling
from runtime.reading.families import CAUSAL_LM_CLASSES, build_skeleton, check_family, family_class, parse_model_config
from runtime.reading.tensors import FolderTensors
from runtime.stages.stage import build_stage
from tests.conftest import RunCommand

# hidden_size 40 is no square: Gemma multiplies embeddings by its rounded square root.
COMMON = {
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED_WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
    "long_factor": [1.5, 2.0, 2.5, 3.0, 4.0],
    "original_max_position_embeddings": 32,
}

FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied, with windows in some layers": ("qwen2", MIXED_WINDOWS | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3 with windows in some layers": ("qwen3", MIXED_WINDOWS),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 10}),
    "phi3": ("phi3", {}),
    "phi3 with long rope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "smollm3": ("smollm3", {}),
    "smollm3 with windows": ("smollm3", {"use_sliding_window": True, "sliding_window": 6}),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "qwen3_moe with a window": (
        "qwen3_moe",
        {"num_experts": 3, "num_experts_per_tok": 1, "use_sliding_window": True, "sliding_window": 6},
    ),
    "mixtral with a window": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 6}),
}


def family_config(features: str) -> PreTrainedConfig:
    family, extra = FEATURES[features]
    return AutoConfig.for_model(family, **COMMON | extra)


def test_every_supported_family_is_tested_here() -> None:
    assert {family for family, _ in FEATURES.values()} == set(SUPPORTED_FAMILIES) == set(CAUSAL_LM_CLASSES)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("features", FEATURES)
def test_cuts_of_a_family_equal_the_unsplit_model(
    features: str, dtype: str, make_checkpoint: Callable[[PreTrainedConfig], Path]
) -> None:
    folder = make_checkpoint(family_config(features))
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    expected = trace(model_step(reference_model(folder, dtype=torch_dtype)), vocab_size=97, num_tokens=24)
    checkpoint = open_checkpoint(folder)
    config, tensors = parse_model_config(checkpoint.config.raw), FolderTensors(checkpoint)
    seed = list(FEATURES).index(features)
    for num_stages in (1, 2, 3, 4):
        cut = some_cut(5, num_stages, seed=5 * seed + num_stages)
        stages = [build_stage(config, spec, tensors, dtype=torch_dtype, device=CPU) for spec in cut]
        apart = trace(stages_step(stages), vocab_size=97, num_tokens=24 if num_stages == 3 else 2)
        assert_same(expected[: len(apart)], apart)
        together = trace(model_step(load(folder, stages=cut, dtype=dtype)), vocab_size=97, num_tokens=2)
        assert_same(expected[: len(together)], together)


@pytest.mark.parametrize("features", ["gemma2", "mixtral", "granite", "phi3 with long rope", "smollm3 with windows"])
def test_generate_gives_a_family_the_same_tokens(
    features: str, make_checkpoint: Callable[[PreTrainedConfig], Path]
) -> None:
    folder = make_checkpoint(family_config(features))
    reference, chain = reference_model(folder, dtype=torch.float32), load(folder, stages=some_cut(5, 3, seed=8))
    ids = torch.randint(4, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    for mode in ({"cache_implementation": "static"}, {"num_beams": 2}, {"prefill_chunk_size": 4}, {"do_sample": True}):
        tokens = []
        for model in (reference, chain):
            torch.manual_seed(11)
            tokens.append(model.generate(ids, max_new_tokens=32, **mode))
        assert torch.equal(*tokens), mode


def test_long_rope_gives_the_same_tokens_in_chunks_and_from_a_kept_cache(
    make_checkpoint: Callable[[PreTrainedConfig], Path],
) -> None:
    folder = make_checkpoint(family_config("phi3 with long rope"))
    reference, chain = reference_model(folder, dtype=torch.float32), load(folder, stages=some_cut(5, 3, seed=8))
    prompt, sampling = torch.randint(4, 97, (40,), generator=torch.Generator().manual_seed(1)).tolist(), Sampling()
    whole = reference.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    for chunk_tokens in (None, 10, 38):
        limits = Limits(context_tokens=96, max_tokens=20, prefill_chunk_tokens=chunk_tokens)
        found = generate(chain, [prompt], sampling=sampling, limits=limits)
        assert [*prompt, *found.sequences[0].token_ids] == whole[0].tolist(), chunk_tokens
    engine, limits = Engine(BareChain(chain)), Limits(context_tokens=96, max_tokens=20)
    for length, cached in ((20, 0), (40, 20)):
        heard = Heard()
        asked = replace(limits, max_tokens=60 - length if cached else 1)
        engine.submit(
            Request(prompt_ids=prompt[:length], sampling=sampling, limits=asked), on_event=heard, reuse_key="mine"
        )
        engine.run_all()
        assert heard.usage is not None
        assert heard.usage.num_cached_tokens == cached
    assert [*prompt, *heard.token_ids] == whole[0].tolist()


def test_an_untested_family_is_refused_with_the_list_of_tested_ones() -> None:
    with pytest.raises(InputError, match=r"model_type gpt2 is not supported; expected one of gemma, .*smollm3"):
        parse_model_config({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="gpt2"):
        check_family("gpt2")


@pytest.mark.parametrize("key", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}, {"num_experts": 0}], ids=str)
def test_layers_without_experts_among_others_are_refused(key: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"layers without experts are not run in this family; expected num_experts"):
        parse_model_config({"model_type": "qwen3_moe"} | COMMON | key)


def test_weights_quantised_in_another_way_are_refused() -> None:
    with pytest.raises(InputError, match="quantised weights with quant_method gptq are not understood"):
        parse_model_config({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}})


@pytest.mark.row("C9")
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize(
    "value", ["somebody/kernel", "somebody/kernel:name", "flash_attention_2", {"": "somebody/kernel"}]
)
def test_code_that_a_configuration_names_elsewhere_is_never_fetched(
    key: str, value: object, shipped: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(shipped, folder)
    raw = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(raw))
    assert open_checkpoint(folder).config.runs_custom_code
    assert build_skeleton(parse_model_config(raw), family_class("llama")).config._attn_implementation == "sdpa"
    done = run_command("llamarun", "check", folder, "--against", folder, "-n", 1)
    assert done.code == 0, done.err
    assert "names some elsewhere; it is ignored and never run" in done.err


def test_an_attention_of_transformers_itself_is_kept(shipped: Path) -> None:
    raw = json.loads((shipped / "config.json").read_text()) | {"attn_implementation": "eager"}
    assert parse_model_config(raw)._attn_implementation == "eager"


@pytest.mark.row("P20")
@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_layers_that_the_one_mask_of_a_family_does_not_fit_are_refused_by_key(family: str) -> None:
    kinds = ["full_attention", "sliding_attention"]
    raw = {"model_type": family, "num_hidden_layers": 2, "layer_types": kinds, "sliding_window": 8, "pad_token_id": 0}
    with pytest.raises(InputError, match=r"config\.json:/layer_types: mixes full_attention and sliding_attention"):
        parse_model_config(raw)
    assert parse_model_config(raw | {"layer_types": kinds[1:] * 2}).layer_types == kinds[1:] * 2


@pytest.mark.row("P20")
@pytest.mark.parametrize("features", ["mistral", "gemma2", "qwen2 tied, with windows in some layers"])
def test_a_window_of_one_token_is_refused_which_transformers_takes_for_none(features: str) -> None:
    raw = family_config(features).to_dict() | {"sliding_window": 1}
    with pytest.raises(InputError, match=r"config\.json:/sliding_window: is 1, and layer \d would see no token"):
        parse_model_config(raw)
    assert parse_model_config(raw | {"sliding_window": 2}).sliding_window == 2


@pytest.mark.row("P20")
def test_a_window_that_no_layer_has_is_nobodys_matter() -> None:
    raw = {"model_type": "qwen2", "sliding_window": 1, "use_sliding_window": False, "pad_token_id": 0}
    assert parse_model_config(raw).sliding_window is None


@pytest.mark.row("P20")
def test_check_compares_a_model_whose_configuration_asks_for_the_routers_logits(
    make_checkpoint: Callable[[PreTrainedConfig], Path], run_command: RunCommand
) -> None:
    config = family_config("mixtral")
    config.output_router_logits = True
    folder = make_checkpoint(config)
    done = run_command("llamarun", "check", folder, "--against", folder, "-n", 3)
    assert (done.code, "bit for bit" in done.err) == (0, True), done.err
