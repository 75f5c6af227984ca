"""A value of the wrong type in config.json or generation_config.json: refused by file, key and value, or harmless.

What is taken has to be taken by transformers too; nothing ends in an exception that is not ours.
"""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.utils import logging

from plans.config.config import parse_config
from plans.config.values import GENERATION_VALUES
from plans.errors import InputError
from runtime.generate.rules import check_rules
from runtime.reading.families import build_skeleton, family_class, parse_model_config
from runtime.reading.generation_config import read_generation_config, score_rules
from tests.conftest import SHIPPED as MODEL
from tests.conftest import RunCommand

logging.set_verbosity_error()

CONFIG: dict[str, Any] = json.loads((MODEL / "config.json").read_text()) | {
    "layer_types": ["full_attention"] * 7,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.0,
        "truncate": True,
    },
    "sliding_window": None,
}
GENERATION: dict[str, Any] = {
    "bad_words_ids": [[5]],
    "begin_suppress_tokens": [5],
    "do_sample": True,
    "eos_token_id": [2, 7],
    "exponential_decay_length_penalty": [5, 1.1],
    "forced_eos_token_id": 2,
    "max_length": 30,
    "max_new_tokens": 20,
    "min_new_tokens": 1,
    "no_repeat_ngram_size": 2,
    "num_beams": 1,
    "repetition_penalty": 1.1,
    "sequence_bias": [[[5], 1.0]],
    "stop_strings": ["x"],
    "suppress_tokens": [5],
    "temperature": 0.8,
    "top_k": 5,
    "top_p": 0.9,
    "watermarking_config": {"bias": 1.0},
}

# One of each type that JSON has, in the shapes people write by mistake; null means "not set" and is tested elsewhere.
TEXT = st.text("abc", min_size=1, max_size=3)
WRONG = st.one_of(
    st.sampled_from(["20GiB", "x", "hot", "", "1e-5", "true"]),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(-2, 2, allow_nan=False).filter(lambda value: value != int(value)),
    st.lists(st.one_of(TEXT, st.floats(0.1, 0.9), st.dictionaries(TEXT, st.booleans())), max_size=3),
    st.dictionaries(TEXT, TEXT, max_size=2),
)
# transformers takes whatever these hold and looks at none of it.
UNREAD = {"transformers_version"}
MANY_TYPES = {"bos_token_id", "eos_token_id", "forced_eos_token_id", "sliding_window", "stop_strings"}


def is_empty_or_int(value: Any) -> bool:
    return value == [] or type(value) is int


def same_type(one: Any, other: Any) -> bool:
    numbers = (int, float)
    return type(one) is type(other) or (type(one) in numbers and type(other) in numbers)


def places(table: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Every key, those inside rope_parameters too."""
    return [(key,) for key in table] + [("rope_parameters", key) for key in table.get("rope_parameters", {})]


def changed(table: Mapping[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(dict(table))
    *outer, last = place
    inner = result
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return result


def test_the_untouched_files_are_read(tmp_path: Path) -> None:
    parse_config(CONFIG, where="config.json")
    config = parse_model_config(CONFIG)
    build_skeleton(config, family_class("llama"))
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION))
    assert read_generation_config(tmp_path) is not None


def refusal(read: Callable[[], object]) -> InputError | None:
    """What is refused, and nothing but that: any other exception is a failure of the test."""
    try:
        read()
    except InputError as error:
        return error
    return None


@pytest.mark.row("P20")
@given(st.sampled_from(places(CONFIG)), WRONG)
def test_a_wrong_type_in_config_json_is_named_by_the_planner(place: tuple[str, ...], value: Any) -> None:
    right = CONFIG[place[0]] if len(place) == 1 else CONFIG["rope_parameters"][place[1]]
    refused = refusal(lambda: parse_config(changed(CONFIG, place, value), where="config.json"))
    if refused is None:
        assert same_type(right, value) or place[-1] in UNREAD or (place[-1] in MANY_TYPES and is_empty_or_int(value))
    elif not same_type(right, value):
        assert f"config.json:/{place[0]}" in refused.line()


@pytest.mark.row("P20")
@given(st.sampled_from(places(CONFIG)), WRONG)
def test_a_wrong_type_in_config_json_ends_no_run_with_a_bug(place: tuple[str, ...], value: Any) -> None:
    broken = changed(CONFIG, place, value)

    def run() -> None:
        parse_config(broken, where="config.json")
        config = parse_model_config(broken)
        build_skeleton(config, family_class(config.model_type))

    refused = refusal(run)
    assert refused is None or "config.json" in refused.line() or "model_type" in refused.line()


@pytest.mark.row("P20")
@example("watermarking_config", {"a": "a"})
@given(st.sampled_from(sorted(GENERATION)), WRONG)
def test_a_wrong_type_in_generation_config_json_is_named_and_the_rest_works(key: str, value: Any) -> None:
    with TemporaryDirectory() as folder:
        Path(folder, "generation_config.json").write_text(json.dumps(GENERATION | {key: value}))

        def run() -> None:
            found = read_generation_config(Path(folder))
            assert found is not None
            check_rules(score_rules(found), vocab_size=64, eos_token_ids={2}, where="generation_config.json")

        refused = refusal(run)
    if refused is None:
        assert same_type(GENERATION[key], value) or key in MANY_TYPES
        assert not isinstance(value, list) or not value or key == "stop_strings"
    else:
        assert "generation_config.json" in refused.line()
        assert key in refused.line()


@pytest.mark.row("P20")
@pytest.mark.parametrize("key", sorted(GENERATION_VALUES))
def test_every_key_of_generation_config_json_refuses_what_it_cannot_be(key: str, tmp_path: Path) -> None:
    for value in ({"a": 1}, [{"a": 1}], -1.5, [1.5], True, "", "hot"):
        if GENERATION_VALUES[key].accepts(value):
            continue
        (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
        with pytest.raises(InputError) as caught:
            read_generation_config(tmp_path)
        line = caught.value.line()
        assert "generation_config.json" in line
        assert f"/{key}: is {json.dumps(value)}" in line
        assert caught.value.exit_code == 3


@pytest.mark.row("P20")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", "20GiB"),
        ("rope_parameters", [1]),
        ("layer_types", "full_attention"),
        ("hidden_act", 3),
        ("pad_token_id", "x"),
        ("use_cache", "yes"),
        ("dtype", 0),
        ("architectures", "LlamaForCausalLM"),
    ],
)
@pytest.mark.parametrize("command", ["analyze", "generate"])
def test_both_commands_name_the_file_the_key_and_the_value(
    key: str, value: Any, command: str, run_command: RunCommand, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    program, rest = {"analyze": ("llamaplan", []), "generate": ("llamarun", ["-p", "x"])}[command]
    done = run_command(program, command, tmp_path, *rest)
    assert done.code == 3
    shown = value if isinstance(value, str) else json.dumps(value)
    assert f"config.json:/{key}: " in done.err
    assert shown in done.err


@pytest.mark.row("P20")
@pytest.mark.parametrize(("key", "value"), [("hidden_act", "20GiB"), ("pad_token_id", 4096), ("initializer_range", 7)])
def test_what_only_transformers_knows_is_named_too(key: str, value: Any) -> None:
    broken = CONFIG | {key: value}
    parse_config(broken, where="config.json")
    with pytest.raises(InputError, match=f"config.json:/{key}: "):
        build_skeleton(parse_model_config(broken), family_class("llama"))
