"""generation_config.json: what a checkpoint asks of `generate()`, and which of it the commands do.

A chain's own `generate()` does all of it. The commands have a loop of their own: scores go through transformers' own
processors, lengths and stop strings are limits, and what is left - other ways to search - is said by name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from plans.config.config import MAX_CONFIG_BYTES
from plans.config.values import GENERATION_VALUES, check_values
from plans.errors import InputError, printable
from plans.reading.strict import read_json

GENERATION_CONFIG_NAME = "generation_config.json"

MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 200

SCORE_RULES: Mapping[str, tuple[Any, ...]] = {
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None, []),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None, []),
    "min_length": (None, 0),
    "min_new_tokens": (None,),
    "no_repeat_ngram_size": (None, 0),
    "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "watermarking_config": (None,),
}
"""What changes scores before a token is chosen, beside the settings that have options; and which values change nothing.

For a decoder the `encoder_` keys are about the prompt.
"""

NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "cache_config": (None,),
    "cache_implementation": (None, "dynamic", "hybrid"),
    "constraints": (None,),
    "diversity_penalty": (None, 0.0),
    "dola_layers": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1.0),
    "max_time": (None,),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0.0),
    "prefill_chunk_size": (None,),
    "prompt_lookup_num_tokens": (None, 0),
    "speculation_type": (None,),
    "token_healing": (None, False),
    "use_cache": (None, True),
    "use_mtp": (None, False),
}
"""What the commands do not do, and which values ask for nothing."""


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Return the checkpoint's defaults for `generate()`, or None if it has none.

    Raises:
        InputError: not JSON, a value of the wrong kind, or one that transformers refuses.
    """
    path = folder / GENERATION_CONFIG_NAME
    if not path.is_file():
        return None
    raw = read_json(path, max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(raw, dict):
        raise InputError("not a JSON object", where=path, code="E-CONFIG")
    check_values(raw, GENERATION_VALUES, where=path)
    _check_stop_strings(raw, where=path)
    try:
        return GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever transformers says about values that only it knows
        what = printable(" ".join(f"{error}".split()), limit=300)
        key = next((f":/{printable(key)}" for key in raw if not _is_taken({key: raw[key]})), "")
        raise InputError(f"transformers refuses it: {what}", where=f"{path}{key}", code="E-CONFIG") from None


def _check_stop_strings(raw: Mapping[str, Any], *, where: object) -> None:
    """Refuse more than a few: transformers compares each character with all tokens, 7 ms for 49,000."""
    stated = raw.get("stop_strings") or ()
    texts = (stated,) if isinstance(stated, str) else stated
    if len(texts) > MAX_STOP_STRINGS or sum(map(len, texts)) > MAX_STOP_CHARACTERS:
        raise InputError(
            f"{len(texts)} stop strings of {sum(map(len, texts))} characters",
            where=f"{where}:/stop_strings",
            expected=f"at most {MAX_STOP_STRINGS} of {MAX_STOP_CHARACTERS} characters together",
            code="E-CONFIG",
        )


def _is_taken(raw: dict[str, Any]) -> bool:
    """Whether transformers takes these values by themselves."""
    try:
        GenerationConfig.from_dict(raw)
    except Exception:
        return False
    return True


def generation_defaults(folder: Path, model_config: PreTrainedConfig, *, raw: Mapping[str, Any]) -> GenerationConfig:
    """Return what `generate()` starts from: generation_config.json, else what config.json says about generating.

    Args:
        folder: the checkpoint.
        model_config: its configuration.
        raw: the same as it is written.

    Raises:
        InputError: as `read_generation_config`.
    """
    found = read_generation_config(folder)
    if found is not None:
        return found
    check_values(raw, GENERATION_VALUES, where="config.json")
    _check_stop_strings(raw, where="config.json")
    return GenerationConfig.from_model_config(model_config)


def score_rules(config: GenerationConfig) -> dict[str, Any]:
    """Return what a checkpoint asks of scores as plain data, without what changes nothing."""
    asked = {name: getattr(config, name, None) for name, neutral in SCORE_RULES.items()}
    rules = {name: value for name, value in asked.items() if value not in SCORE_RULES[name]}
    watermark = rules.get("watermarking_config")
    return rules if watermark is None else rules | {"watermarking_config": watermark.to_dict()}


def not_done(config: GenerationConfig) -> tuple[str, ...]:
    """Return one sentence about everything that is asked for and not done, or none."""
    asked = {name: getattr(config, name, None) for name in NOT_DONE}
    named = [f"{name} ({printable(asked[name], limit=40)})" for name in asked if asked[name] not in NOT_DONE[name]]
    if not named:
        return ()
    what = ", ".join(named)
    return (f"{GENERATION_CONFIG_NAME} asks for {what}; the commands do not do that and choose tokens without it",)


def stop_strings(config: GenerationConfig) -> tuple[str, ...]:
    """Return the texts that end a sequence."""
    stated = config.stop_strings
    return (stated,) if isinstance(stated, str) else tuple(stated or ())


def end_tokens(config: GenerationConfig, *, default: int | None, vocab_size: int) -> tuple[frozenset[int], list[int]]:
    """Return the tokens that end a sequence, and those that were stated but do not exist.

    As in `generate()` the latter end nothing; the tokenizer's `default` counts where nothing is stated.
    """
    stated = config.eos_token_id
    values = stated if isinstance(stated, list) else [stated]
    ids = [value for value in values if value is not None] or [value for value in [default] if value is not None]
    found = frozenset(value for value in ids if 0 <= value < vocab_size)
    return found, [value for value in ids if value not in found]
