"""What a value in config.json and in generation_config.json may be: one table per file, read by planner and runtime.

Planning depends on few of these keys (`plans.config.config` checks those), but a model whose norm's epsilon is a
text runs nowhere. A null stands where transformers takes one; keys that are in no table are left to transformers.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from plans.errors import InputError, printable

MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value: what it is called in an error, and whether a value is one."""

    expected: str
    accepts: Callable[[Any], bool]

    @property
    def or_null(self) -> "Kind":
        """The same kind with null for "not set"."""
        return Kind(f"{self.expected}, or null", lambda value: value is None or self.accepts(value))


def integer(minimum: int, maximum: int = 2**31) -> Kind:
    """Whole numbers of a range, both ends included."""
    return Kind(f"an integer from {minimum} to {maximum}", lambda value: _is_integer(value, minimum, maximum))


def number(minimum: float, maximum: float = float("inf"), *, is_open: bool = False) -> Kind:
    """Numbers of a range; without its lower end where `is_open`."""
    end = f" up to {maximum:g}" if maximum < float("inf") else ""
    words = f"a number {'above' if is_open else 'from'} {minimum:g}{end}"

    def accepts(value: Any) -> bool:
        return _is_number(value) and (minimum < value if is_open else minimum <= value) and value <= maximum

    return Kind(words, accepts)


def list_of(item: Kind, *, of: str) -> Kind:
    """Lists whose every item is of one kind."""
    return Kind(f"a list of {of}", lambda value: isinstance(value, list) and all(map(item.accepts, value)))


def _is_integer(value: Any, minimum: int, maximum: int) -> bool:
    return type(value) is int and minimum <= value <= maximum


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_bias(value: Any) -> bool:
    """`[[[token ids], bias], ...]`: JSON has no tuples as keys, so transformers writes pairs."""
    pairs = value if isinstance(value, list) and value else [None]
    return all(
        isinstance(pair, list) and len(pair) == 2 and _WORD.accepts(pair[0]) and _is_number(pair[1]) for pair in pairs
    )


def _is_decay(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_integer(value[0], 0, 2**31) and _is_number(value[1])


_FLAG = Kind("true or false", lambda value: type(value) is bool)
_TEXT = Kind("a text", lambda value: isinstance(value, str))
_TABLE = Kind("a table", lambda value: isinstance(value, dict))
# Ids below zero are transformers' old way to say "none"; the tokens themselves are checked where they are used.
_TOKEN = integer(-MAX_TOKEN_ID, MAX_TOKEN_ID)
_TOKEN_LIST = list_of(_TOKEN, of="token ids")
_TOKENS = Kind("a token id or a list of them", lambda value: _TOKEN.accepts(value) or _TOKEN_LIST.accepts(value))
_WORD = Kind("a list of token ids", lambda value: _TOKEN_LIST.accepts(value) and bool(value))
_ANY_NUMBER = number(-float("inf"))
_POSITIVE = number(0, is_open=True)
_SHARE = number(0, 1)

CONFIG_VALUES: Mapping[str, Kind] = {
    "attention_bias": _FLAG.or_null,
    "attention_dropout": _ANY_NUMBER.or_null,
    "attention_multiplier": _ANY_NUMBER,
    "attn_logit_softcapping": _POSITIVE.or_null,
    "bos_token_id": _TOKENS.or_null,
    "embd_pdrop": _ANY_NUMBER.or_null,
    "embedding_multiplier": _ANY_NUMBER,
    "eos_token_id": _TOKENS.or_null,
    "final_logit_softcapping": _POSITIVE.or_null,
    "hidden_act": _TEXT,
    "hidden_activation": _TEXT.or_null,
    "initializer_range": _ANY_NUMBER,
    "layer_norm_eps": number(0),
    "layer_types": list_of(_TEXT, of="names, one per layer").or_null,
    "logits_scaling": _ANY_NUMBER,
    "max_window_layers": integer(0).or_null,
    "mlp_bias": _FLAG.or_null,
    "no_rope_layer_interval": integer(0).or_null,
    "no_rope_layers": list_of(integer(0), of="integers, one per layer").or_null,
    "original_max_position_embeddings": integer(1).or_null,
    "output_router_logits": _FLAG,
    "pad_token_id": _TOKEN.or_null,
    "partial_rotary_factor": _POSITIVE.or_null,
    "pretraining_tp": integer(0).or_null,
    "quantization_config": _TABLE.or_null,
    "query_pre_attn_scalar": _POSITIVE,
    "resid_pdrop": _ANY_NUMBER.or_null,
    "residual_multiplier": _ANY_NUMBER,
    "rms_norm_eps": number(0),
    "rope_parameters": _TABLE.or_null,
    "rope_scaling": _TABLE.or_null,
    "rope_theta": _POSITIVE.or_null,
    "router_aux_loss_coef": _ANY_NUMBER,
    "router_jitter_noise": _ANY_NUMBER,
    "sliding_window": integer(0).or_null,
    "use_bidirectional_attention": _FLAG.or_null,
    "use_cache": _FLAG.or_null,
    "use_sliding_window": _FLAG.or_null,
}
"""Keys of config.json beside the sizes that `plans.config.config` checks one by one."""

ROPE_VALUES: Mapping[str, Kind] = {
    "attention_factor": _POSITIVE.or_null,
    "beta_fast": _POSITIVE.or_null,
    "beta_slow": _POSITIVE.or_null,
    "factor": _POSITIVE.or_null,
    "high_freq_factor": _POSITIVE.or_null,
    "long_factor": list_of(_POSITIVE, of="numbers above 0").or_null,
    "low_freq_factor": _POSITIVE.or_null,
    "mscale": _ANY_NUMBER.or_null,
    "mscale_all_dim": _ANY_NUMBER.or_null,
    "original_max_position_embeddings": number(1),
    "partial_rotary_factor": _POSITIVE.or_null,
    "rope_theta": _POSITIVE,
    "short_factor": list_of(_POSITIVE, of="numbers above 0").or_null,
    "truncate": _FLAG.or_null,
}
"""Keys of `rope_parameters` and `rope_scaling`."""

GENERATION_VALUES: Mapping[str, Kind] = {
    name: kind.or_null
    for name, kind in {
        "bad_words_ids": list_of(_WORD, of="lists of token ids"),
        "begin_suppress_tokens": _TOKEN_LIST,
        "bos_token_id": _TOKENS,
        "cache_implementation": _TEXT,
        "diversity_penalty": _ANY_NUMBER,
        "do_sample": _FLAG,
        "early_stopping": Kind("true, false or 'never'", lambda value: type(value) is bool or value == "never"),
        "encoder_no_repeat_ngram_size": integer(0),
        "encoder_repetition_penalty": _POSITIVE,
        "eos_token_id": _TOKENS,
        "epsilon_cutoff": number(0),
        "eta_cutoff": number(0),
        "exponential_decay_length_penalty": Kind("a list of a start and a factor", _is_decay),
        "forced_bos_token_id": _TOKEN,
        "forced_eos_token_id": _TOKENS,
        "guidance_scale": _ANY_NUMBER,
        "length_penalty": _ANY_NUMBER,
        "max_length": integer(1),
        "max_new_tokens": integer(1),
        "max_time": _POSITIVE,
        "min_length": integer(0),
        "min_new_tokens": integer(0),
        "min_p": _SHARE,
        "no_repeat_ngram_size": integer(0),
        "num_assistant_tokens": integer(0),
        "num_beam_groups": integer(1),
        "num_beams": integer(1),
        "num_return_sequences": integer(1),
        "output_attentions": _FLAG,
        "output_hidden_states": _FLAG,
        "output_logits": _FLAG,
        "output_scores": _FLAG,
        "pad_token_id": _TOKEN,
        "penalty_alpha": _ANY_NUMBER,
        "prefill_chunk_size": integer(1),
        "prompt_lookup_num_tokens": integer(0),
        "remove_invalid_values": _FLAG,
        "renormalize_logits": _FLAG,
        "repetition_penalty": _POSITIVE,
        "return_dict_in_generate": _FLAG,
        "sequence_bias": Kind("a list of pairs of token ids and a bias", _is_bias),
        "stop_strings": Kind(
            "a text or a list of texts, none empty",
            lambda value: bool(value) and (isinstance(value, str) or (isinstance(value, list) and _are_texts(value))),
        ),
        "suppress_tokens": _TOKEN_LIST,
        "temperature": number(0),
        "token_healing": _FLAG,
        "top_h": number(0, 1, is_open=True),
        "top_k": integer(0),
        "top_p": _SHARE,
        "typical_p": number(0, 1, is_open=True),
        "use_cache": _FLAG,
        "watermarking_config": _TABLE,
    }.items()
}
"""Keys of generation_config.json."""


def check_values(raw: Mapping[str, Any], kinds: Mapping[str, Kind], *, where: object, inside: str = "") -> None:
    """Require that every known key of a table has a value of its kind.

    Args:
        raw: the parsed table.
        kinds: what its keys may be.
        where: the file.
        inside: JSON pointer of the table in the file.

    Raises:
        InputError: names the file, the key, the value and what was expected.
    """
    for name in raw.keys() & kinds.keys():
        if not kinds[name].accepts(raw[name]):
            shown = printable(json.dumps(raw[name]), limit=60)
            raise InputError(
                f"is {shown}", where=f"{where}:{inside}/{name}", expected=kinds[name].expected, code="E-CONFIG"
            )


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) and value for value in values)
