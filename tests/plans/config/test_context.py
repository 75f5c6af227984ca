"""The longest context a configuration allows: as far as its rope scaling reaches, by the published recipes."""

from typing import Any

import pytest

from plans.config.config import parse_config
from plans.profile import ModelIdentity
from tests.planner.cases import TINY, tiny_profile

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

LONGEST: dict[str, tuple[int, dict[str, Any], int]] = {
    "no scaling": (2048, {}, 2048),
    "default rope with a factor left behind": (
        2048,
        {"rope_parameters": {"rope_type": "default", "factor": 4.0}},
        2048,
    ),
    # Qwen's documentation, "Processing Long Texts": YaRN with factor 4 for 131,072 tokens.
    "Qwen2.5, YaRN": (32768, {"rope_scaling": YARN}, 131072),
    "Qwen3, YaRN": (40960, {"rope_scaling": YARN}, 131072),
    "Qwen2.5, YaRN, old spelling": (32768, {"rope_scaling": {**YARN, "type": "yarn"}}, 131072),
    # lmsys/vicuna-7b-v1.5-16k: 4096 x 4.
    "linear": (4096, {"rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
    "dynamic": (4096, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 1e4}}, 10240),
    # meta-llama/Llama-3.1-8B: max_position_embeddings is more than 8192 x 8.
    "Llama 3.1": (
        131072,
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        131072,
    ),
    "llama3 from its original length": (
        8192,
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        65536,
    ),
    "longrope": (
        131072,
        {
            "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
            "original_max_position_embeddings": 4096,
        },
        131072,
    ),
    "a factor that shrinks": (4096, {"rope_scaling": {"type": "linear", "factor": 0.5}}, 4096),
    "both spellings": (4096, {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN}, 131072),
    "Gemma 3 counts its factor already": (
        131072,
        {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        131072,
    ),
}


@pytest.mark.row("P19")
@pytest.mark.parametrize("name", LONGEST)
def test_the_longest_context_is_the_original_length_times_the_factor(name: str) -> None:
    trained, changes, longest = LONGEST[name]
    config = parse_config(TINY | {"max_position_embeddings": trained} | changes, where="config.json")
    assert config.longest_context_tokens == longest


def test_a_profile_says_only_what_scaling_adds_so_that_other_profiles_keep_their_bytes() -> None:
    plain = tiny_profile(max_position_embeddings=4096)
    assert "scaled_context_tokens" not in plain.to_json()
    assert plain.model.longest_context_tokens == 4096
    scaled = tiny_profile(max_position_embeddings=32768, rope_scaling=YARN).model
    assert scaled.longest_context_tokens == 131072
    assert ModelIdentity.from_json(scaled.to_json().encode(), where="profile") == scaled
