"""Which model families run as a chain, and how their classes are named.

A family is admitted only when `tests/runtime/test_families.py` shows that its chain is bit-identical to the unsplit
model. Everything else is refused here, in one place.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from plans.config.config import without_foreign_code
from plans.config.windows import ONE_MASK
from plans.errors import InputError, printable
from plans.packed.config import Packing, read_packing
from runtime.reading.placing import place_packed

CAUSAL_LM_CLASSES: Mapping[str, str] = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
"""`model_type` in config.json -> the transformers class whose forward the chain runs."""

PER_LAYER_KEYS = ("layer_types", "no_rope_layers")
"""Configuration lists with one entry per layer; a stage keeps only its own range of them."""

_FIELD = re.compile(r"[Ff]ield '(\w+)'")


WITH_EXPERTS = ("mixtral", "qwen3_moe")


def family_class(model_type: str) -> type[PreTrainedModel]:
    """Return the transformers class of a supported `model_type`."""
    family: type[PreTrainedModel] = getattr(transformers, CAUSAL_LM_CLASSES[model_type])
    return family


def check_family(model_type: object) -> None:
    """Refuse what has no parity test.

    Raises:
        InputError: naming the family and the supported ones.
    """
    if model_type not in CAUSAL_LM_CLASSES:
        raise InputError(
            f"model_type {printable(model_type, limit=40)} is not supported",
            expected=f"one of {', '.join(CAUSAL_LM_CLASSES)}",
            hint="analyze and solve still size it",
            code="E-FAMILY",
        )


def packing_of(config: PreTrainedConfig) -> Packing | None:
    """Return how the weights of a model are packed; None where they are not. Errors as `read_packing`."""
    return read_packing({"quantization_config": getattr(config, "quantization_config", None)})


def parse_model_config(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """Build the transformers configuration from the parsed `config.json`; no code that it brings or names is run.

    Both spellings of rotary settings are read: `rope_parameters`, and `rope_theta` with `rope_scaling`.

    Raises:
        InputError: the family is not supported, its weights are packed in a way that is not understood, or transformers
            refuses a value.
    """
    check_family(raw.get("model_type"))
    packing = read_packing(raw)
    with _named_refusals():
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(without_foreign_code(raw)))
    _check_what_runs(config)
    _check_experts(config, is_packed=packing is not None)
    _check_windows(config)
    return config


def _check_experts(config: PreTrainedConfig, *, is_packed: bool) -> None:
    """Refuse layers without experts among others, and ways to compute packed experts other than the usual one."""
    if config.model_type not in WITH_EXPERTS:
        return
    is_mixed = getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1
    if is_mixed or not config.num_local_experts:
        raise InputError(
            "layers without experts are not run in this family",
            where="config.json",
            expected="num_experts above 0, decoder_sparse_step 1, no mlp_only_layers",
            hint="analyze and solve still size it",
            code="E-CONFIG",
        )
    how = config._experts_implementation
    if is_packed and how not in (None, "grouped_mm"):
        raise InputError(
            f"is {printable(how, limit=40)}, and packed experts are computed in one way alone",
            where="config.json:/experts_implementation",
            expected="'grouped_mm', or nothing",
            code="E-CONFIG",
        )


def _check_what_runs(config: PreTrainedConfig) -> None:
    """Refuse what transformers notices only when it builds the model, and then without naming the key."""
    activation = getattr(config, "hidden_act", None)
    if activation is not None and activation not in ACT2FN:
        raise InputError(
            f"activation '{printable(activation, limit=40)}' does not exist",
            where="config.json:/hidden_act",
            expected="one that transformers knows, such as 'silu'",
            code="E-CONFIG",
        )
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if config.model_type in ONE_MASK and len(kinds) > 1:
        raise InputError(
            f"mixes {' and '.join(kinds)}, and transformers' {config.model_type} has one mask for all layers",
            where="config.json:/layer_types",
            expected="one kind for all layers",
            hint="analyze and solve still size it",
            code="E-CONFIG",
        )
    pad = config.pad_token_id
    if pad is not None and pad >= config.vocab_size:
        raise InputError(
            f"token id {pad} is outside the vocabulary",
            where="config.json:/pad_token_id",
            expected=f"0 to {config.vocab_size - 1}",
            code="E-CONFIG",
        )


def _check_windows(config: PreTrainedConfig) -> None:
    """Refuse windows of one token: transformers' cache keeps the last N - 1 tokens, and for none of them all."""
    kept = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    if 1 in kept:
        raise InputError(
            f"is 1, and layer {kept.index(1)} would see no token but the last",
            where="config.json:/sliding_window",
            expected="an integer above 1",
            hint="analyze and solve still size it",
            code="E-CONFIG",
        )


def build_skeleton(config: PreTrainedConfig, family: type[PreTrainedModel]) -> PreTrainedModel:
    """Build the whole model without memory (meta device), in evaluation mode, on a private copy of `config`.

    Layers that are stored packed are packed in it.

    Raises:
        InputError: a value of the configuration builds no model, such as an activation that does not exist, or
            `quantization_config` does not fit the model.
    """
    with torch.device("meta"), _named_refusals():
        model = family(copy.deepcopy(config))
    packing = packing_of(config)
    if packing is not None:
        place_packed(model, packing)
    model.eval()  # type: ignore[no-untyped-call]
    return model


@contextmanager
def _named_refusals() -> Iterator[None]:
    """Turn whatever transformers says about a configuration, in whichever exception, into an error of ours."""
    try:
        yield
    except Exception as error:
        what = printable(" ".join(f"{error}".split()) or type(error).__name__, limit=300)
        field = _FIELD.search(what)
        where = f"config.json:/{field[1]}" if field else "config.json"
        raise InputError(f"transformers refuses it: {what}", where=where, code="E-CONFIG") from None


def rope_switch(config: PreTrainedConfig) -> int | None:
    """Return the sequence length past which Phi-3's rotary factors are the long ones; None for other families.

    transformers computes all keys again when a sequence crosses it (`Phi3ForCausalLM.prepare_inputs_for_generation`).
    """
    return getattr(config, "original_max_position_embeddings", None) if config.model_type == "phi3" else None
