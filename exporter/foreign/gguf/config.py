"""The metadata of a GGUF file -> the `config.json` of the checkpoint that it becomes.

`plans.gguf.config` reads what planning depends on; here follows what computing depends on. A key of the architecture
that is not understood is refused: overlooked, it would give other numbers and no error.
Source: the keys in docs/gguf.md of ggml, how convert_hf_to_gguf.py writes them, and the classes of transformers 5.23.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.foreign.gguf.rope import llama3_table
from plans.errors import InputError, printable
from plans.gguf.config import config_of
from plans.gguf.header import GgufTensor

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Family:
    """What transformers has for an architecture whose tensors it has one by one."""

    class_name: str
    interleaves: bool
    """Whether rows of q and k lie in pairs, as ggml's first kind of rotary positions wants them."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", interleaves=True),
    "qwen2": Family("Qwen2ForCausalLM", interleaves=False),
    "qwen3": Family("Qwen3ForCausalLM", interleaves=False),
}
"""`general.architecture` -> what it becomes."""

_UNDERSTOOD = (
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("expert_count", "expert_used_count", "rope.dimension_count", "rope.freq_base", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.finetuned", "rope.scaling.original_context_length", "vocab_size"),
)
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_ENDS = ("eos", "eot", "eom")
"""Ids that end a sequence, of a turn, of a message: any of them ends what is generated."""


def checkpoint_config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, GgufTensor],
    *,
    architecture: str,
    dtype: str,
    rope_factors: tuple[float, ...] | None,
    where: object,
) -> dict[str, Any]:
    """Return `config.json`, without what says how weights are packed.

    Args:
        metadata: of the (first) file.
        tensors: of all files, by their names there.
        architecture: one that `FAMILIES` knows, see `require_family`.
        dtype: the model's, as torch spells it.
        rope_factors: the numbers of `rope_freqs.weight`, if there is one.
        where: the file, for errors.

    Raises:
        InputError: a key that is missing, malformed or not understood.
    """
    _refuse_unknown(metadata, architecture, where)
    config = config_of(metadata, tensors, architecture=architecture, where=where)
    del config["quantization_config"], config["sliding_window"]
    read = _Numbers(metadata, architecture, where)
    head_dim = config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if read.number("rope.dimension_count", head_dim) != head_dim:
        raise read.error("rope.dimension_count", f"expected the {head_dim} of a head")
    config |= {
        "architectures": [FAMILIES[architecture].class_name],
        "dtype": dtype,
        "hidden_act": "silu",
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": read.number("rope.freq_base", 10000.0),
        "vocab_size": tensors["token_embd.weight"].shape[0],
    }
    config |= _scaling(config, rope_factors, where) | token_ids(metadata, where=where)
    return dict(sorted(config.items()))


def require_family(architecture: str, *, num_experts: int, where: object) -> Family:
    """Return what an architecture becomes.

    Raises:
        InputError: its tensors are changed on the way to GGUF in a way that is not undone here, or it has experts.
    """
    if architecture not in FAMILIES:
        raise InputError(
            f"is of architecture {architecture}, which is planned and not exported",
            where=where,
            expected=" or ".join(FAMILIES),
            hint=_OTHER_WAY,
            code="E-FAMILY",
        )
    if num_experts:
        raise InputError(
            f"has {num_experts} experts, which are planned and not exported",
            where=where,
            expected="a dense model",
            hint=_OTHER_WAY,
            code="E-FAMILY",
        )
    return FAMILIES[architecture]


_OTHER_WAY = "'llamaplan emit PLAN --for llama.cpp' runs the file as it is; or take the model's safetensors checkpoint"


def token_ids(metadata: Mapping[str, Any], *, where: object) -> dict[str, int]:
    """Return the ids of special tokens, as `config.json` has them; none of those the file does not name."""
    found = {key: _token(metadata, name, where) for key, name in _TOKENS.items()}
    return {key: number for key, number in found.items() if number is not None}


def generation_config(metadata: Mapping[str, Any], *, where: object) -> dict[str, Any]:
    """Return `generation_config.json`: special tokens, and every token that ends what is generated."""
    ends = dict.fromkeys(_token(metadata, name, where) for name in _ENDS)
    known = [number for number in ends if number is not None]
    ids: dict[str, Any] = dict(token_ids(metadata, where=where))
    return ids | ({"eos_token_id": known if len(known) > 1 else known[0]} if known else {})


def _token(metadata: Mapping[str, Any], name: str, where: object) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    found, tokens = metadata.get(key), metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else 0
    if found is None or found == 2**32 - 1:  # as some converters write a token that there is not
        return None
    if type(found) is not int or not 0 <= found < count:
        raise InputError(
            f"{key} is {printable(found, limit=40)}", where=where, expected=f"one of {count} tokens", code="E-CONFIG"
        )
    return found


def _refuse_unknown(metadata: Mapping[str, Any], architecture: str, where: object) -> None:
    prefix = f"{architecture}."
    known = {prefix + key for key in _UNDERSTOOD}
    for key, value in metadata.items():
        if key.startswith(prefix) and key not in known and value not in (None, 0, False):
            raise InputError(
                f"{printable(key, limit=80)} is {printable(value, limit=40)}, which is not understood: without it the "
                "export could compute something else",
                where=where,
                hint=_OTHER_WAY,
                code="E-CONFIG",
            )


def _scaling(config: Mapping[str, Any], factors: tuple[float, ...] | None, where: object) -> dict[str, Any]:
    if factors is None:
        return {}
    if "rope_scaling" in config:
        raise InputError(f"{ROPE_FACTORS} lies beside another rope scaling", where=where, code="E-CONFIG")
    table = llama3_table(factors, theta=config["rope_theta"], head_dim=config["head_dim"])
    if table is None:
        raise InputError(
            f"{ROPE_FACTORS} is not the rope scaling of Llama 3.1 or 3.2", where=where, hint=_OTHER_WAY, code="E-CONFIG"
        )
    return {"rope_scaling": table}


@dataclass(frozen=True, slots=True)
class _Numbers:
    metadata: Mapping[str, Any]
    architecture: str
    where: object

    def number(self, key: str, default: float | None = None) -> float:
        found = self.metadata.get(f"{self.architecture}.{key}", default)
        if type(found) is int and found > 0:
            return found
        if type(found) is not float or not 0 < found < float("inf"):
            raise self.error(key, "expected a positive number")
        return shortest(found)

    def error(self, key: str, expected: str) -> InputError:
        found = printable(self.metadata.get(f"{self.architecture}.{key}", "missing"), limit=40)
        return InputError(
            f"{self.architecture}.{key} is {found}",
            where=self.where,
            expected=expected.removeprefix("expected "),
            code="E-CONFIG",
        )


def shortest(number: float) -> float:
    """Return the shortest decimal that is the same fp32 number: what a person had written.

    >>> shortest(9.999999747378752e-06)
    1e-05
    """
    stored = struct.pack("<f", number)
    for digits in range(1, 10):
        text = f"{number:.{digits}g}"
        if struct.pack("<f", float(text)) == stored:
            return float(text)
    return number
