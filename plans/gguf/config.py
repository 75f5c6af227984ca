"""The metadata of a GGUF file -> what `config.json` would say of the same model, as far as planning depends on it.

Where the metadata are silent the tensors speak: a tied head is one without `output.weight`, a bias is one that is
there. Left out on purpose: `rope_freqs.weight` in place of Llama 3.1's rope scaling (`context_length` counts it
already), and the sliding window of architectures for which llama.cpp keeps every token all the same (phi3).
Source: the keys in docs/gguf.md of ggml, and how llama.cpp reads them (`llama-model.cpp`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plans.errors import InputError, printable
from plans.gguf.header import GgufTensor

COMPUTE_DTYPE = "float16"
"""What llama.cpp keeps the KV cache in, unless told otherwise."""
_SCALED = ("linear", "yarn")


def config_of(
    metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], *, architecture: str, where: object
) -> dict[str, Any]:
    """Return a `config.json` of the model; its values are checked by `plans.config.config.parse_config`.

    Args:
        metadata: of the (first) file.
        tensors: of all files, by their names there.
        architecture: one that `plans.gguf.names` knows.
        where: the file, for errors.

    Raises:
        InputError: a number that is missing, no number, or not one number for all layers.
    """
    read = _Reader(metadata, architecture, where)
    heads, experts = read.required("attention.head_count"), read.optional("expert_count") or 0
    head_dim = read.optional("attention.key_length")
    if head_dim != (other := read.optional("attention.value_length")):
        raise read.error("attention.value_length", f"{other} beside a key length of {head_dim}", "the same")
    config: dict[str, Any] = {
        "model_type": "mixtral" if experts else architecture,
        "hidden_size": read.required("embedding_length"),
        "intermediate_size": read.required("feed_forward_length"),
        "num_hidden_layers": read.required("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if (kv := read.optional("attention.head_count_kv")) is None else kv,
        "max_position_embeddings": read.required("context_length"),
        "vocab_size": _vocab_size(read, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "dtype": COMPUTE_DTYPE,
        "sliding_window": _sliding_window(read),
        "quantization_config": {"quant_method": "gguf"},
    }
    config |= {} if head_dim is None else {"head_dim": head_dim}
    config |= _experts(read, experts) | _rope_scaling(read)
    return config


@dataclass(frozen=True, slots=True)
class _Reader:
    metadata: Mapping[str, Any]
    architecture: str
    where: object

    def required(self, key: str) -> int:
        found = self.optional(key)
        if found is None:
            raise self.error(key, "missing", "a number")
        return found

    def optional(self, key: str) -> int | None:
        """Return a whole number; a list of one number per layer counts where all are equal."""
        found = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(found, list) and found and all(value == found[0] for value in found):
            found = found[0]
        if found is None or (type(found) is int and found >= 0):
            return found
        if isinstance(found, list):
            raise self.error(key, f"not one number: {printable(found, limit=40)}", "the same for every layer")
        raise self.error(key, printable(found, limit=40), "a whole number")

    def error(self, key: str, what: str, expected: str) -> InputError:
        return InputError(f"{self.architecture}.{key} is {what}", where=self.where, expected=expected, code="E-CONFIG")


def _vocab_size(read: _Reader, tensors: Mapping[str, GgufTensor]) -> int:
    """As llama.cpp counts: the tokens; of a file without a tokenizer, what it says, or the rows of the embedding."""
    tokens = read.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and tokens:
        return len(tokens)
    said = read.optional("vocab_size")
    if said is not None or "token_embd.weight" not in tensors:
        return said or 0
    return tensors["token_embd.weight"].shape[0]


def _sliding_window(read: _Reader) -> int | None:
    window = read.optional("attention.sliding_window")
    if read.architecture == "gemma2":
        return 4096 if window is None else window
    if read.architecture == "olmo2" and window:  # OLMo 3 under the same name: which layers forget is not written down
        raise read.error("attention.sliding_window", str(window), "none: only OLMo 2 is understood")
    return None


def _experts(read: _Reader, experts: int) -> dict[str, int]:
    if not experts:
        return {}
    if read.architecture != "llama":
        raise read.error("expert_count", str(experts), "none: experts are understood in architecture llama")
    return {"num_local_experts": experts, "num_experts_per_tok": read.required("expert_used_count")}


def _rope_scaling(read: _Reader) -> dict[str, Any]:
    kind = read.metadata.get(f"{read.architecture}.rope.scaling.type")
    if kind not in _SCALED:
        return {}
    table = {"rope_type": kind, "factor": read.metadata.get(f"{read.architecture}.rope.scaling.factor")}
    original = read.optional("rope.scaling.original_context_length")
    return {"rope_scaling": table | ({} if original is None else {"original_max_position_embeddings": original})}
