"""`config.json`: what is read, in which spellings, and what is refused with which words."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.config.config import (
    FAMILY_DEFAULTS,
    ROPE_TYPES,
    SUPPORTED_FAMILIES,
    ModelConfig,
    parse_config,
    read_config,
)
from plans.errors import InputError
from tests.planner.cases import TINY


def parse(**changes: Any) -> ModelConfig:
    return parse_config(TINY | changes, where="config.json")


def test_head_dim_is_read_and_only_derived_where_it_is_absent() -> None:
    assert parse(head_dim=24).head_dim == 24
    assert parse(head_dim=None).head_dim == 32 // 4


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_spellings_of_the_dtype_are_read(key: str) -> None:
    raw = {k: v for k, v in TINY.items() if k != "dtype"} | {key: "float16"}
    assert parse_config(raw, where="x").dtype == "fp16"


def test_without_a_dtype_weights_are_fp32_as_in_transformers() -> None:
    assert parse(dtype=None).dtype == "fp32"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_theta": 10000.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
    ],
    ids=str,
)
def test_every_spelling_of_rope_scaling_is_read(rope: dict[str, Any]) -> None:
    assert parse(**rope).rope_type == "linear"


@pytest.mark.parametrize("kind", [kind for kind, needed in ROPE_TYPES.items() if needed])
def test_rope_scaling_without_a_number_it_needs_is_refused(kind: str) -> None:
    complete: dict[str, Any] = {"rope_type": kind}
    for name in ROPE_TYPES[kind]:
        complete[name] = [1.0, 1.0] if kind == "longrope" else 2.0
    assert parse(rope_parameters=complete).rope_type == kind
    for name in ROPE_TYPES[kind]:
        for bad in ("missing", None, 0, -1.0, "2", True):
            broken = {k: v for k, v in complete.items() if k != name} | ({} if bad == "missing" else {name: bad})
            with pytest.raises(InputError, match=name):
                parse(rope_parameters=broken)


@pytest.mark.parametrize("reach", [{"factor": 1e300}, {"factor": 2.0, "original_max_position_embeddings": 1e30}])
@pytest.mark.parametrize("positions", [1, 512])
def test_a_stretch_that_no_context_reaches_is_refused_by_its_key(reach: dict[str, float], positions: int) -> None:
    with pytest.raises(InputError, match="/rope_scaling: stretches the context by"):
        parse(rope_scaling={"rope_type": "yarn", **reach}, max_position_embeddings=positions)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": "3"}, '/num_hidden_layers: is "3"; expected an integer'),
        ({"num_hidden_layers": None}, "/num_hidden_layers: is null; expected an integer"),
        ({"tie_word_embeddings": "true"}, '/tie_word_embeddings: is "true"; expected true or false'),
        ({"torch_dtype": "int4", "dtype": None}, '/torch_dtype: is "int4"; expected float32'),
    ],
    ids=str,
)
def test_a_value_is_shown_as_the_file_spells_it_under_its_own_key(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        parse(**changes)


@pytest.mark.parametrize("kind", ["spiral", "", 3, None, ["linear"]])
def test_an_unknown_rope_type_is_refused_and_never_defaulted(kind: Any) -> None:
    with pytest.raises(InputError, match="rope"):
        parse(rope_parameters={"rope_type": kind, "factor": 2.0})


COUNTS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 10**12, 32.0, "32", True, None, [], {}], ids=str)
def test_a_count_is_an_integer_in_range_and_the_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"config\.json:/{field}: .*expected an integer from 1 to"):
        parse(**{field: value})


@pytest.mark.parametrize("field", COUNTS)
def test_a_missing_count_is_named(field: str) -> None:
    with pytest.raises(InputError, match=f"/{field}: is missing"):
        parse_config({key: value for key, value in TINY.items() if key != field}, where="config.json")


@given(heads=st.integers(1, 64), kv_heads=st.integers(1, 64), hidden=st.integers(1, 512))
def test_heads_divide_the_hidden_size_and_kv_heads_divide_heads(heads: int, kv_heads: int, hidden: int) -> None:
    changes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": hidden, "head_dim": None}
    if hidden % heads or heads % kv_heads:
        with pytest.raises(InputError, match=rf"{heads}.*does not divide|does not divide.* {heads}") as caught:
            parse(**changes)
        assert str(hidden if hidden % heads else kv_heads) in str(caught.value)
    else:
        assert parse(**changes).head_dim == hidden // heads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "/model_type: is missing"),
        ({"model_type": 3}, "/model_type: is 3"),
        ({"model_type": ""}, "/model_type"),
        ({"tie_word_embeddings": "yes"}, '/tie_word_embeddings: is "yes"; expected true or false'),
        ({"attention_bias": 1}, "/attention_bias"),
        ({"dtype": "int4"}, '/dtype: is "int4"'),
        ({"dtype": 16}, "/dtype"),
        ({"architectures": "Llama"}, "/architectures"),
        ({"architectures": [3]}, "/architectures"),
        ({"rope_scaling": "linear"}, "/rope_scaling"),
        ({"rope_parameters": {"full_attention": 3}}, "/rope_parameters/full_attention: is 3; expected a table"),
        ({"rope_scaling": {"rope_type": None}}, "/rope_scaling: rope type null is not known"),
        ({"model_type": "mixtral", "num_local_experts": None}, "/num_local_experts: is null"),
        ({"model_type": "mixtral", "num_experts": 0}, "/num_experts: is 0"),
        ({"sliding_window": 0}, "/sliding_window"),
        ({"sliding_window": "8"}, "/sliding_window"),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"]}, "/layer_types: does not list 4 layers"),
        ({"num_experts": 4, "num_experts_per_tok": 8}, "8 is more than the 4 experts"),
        ({"head_dim": 0}, "/head_dim"),
        ({"num_key_value_heads": 0}, "/num_key_value_heads"),
    ],
    ids=str,
)
def test_a_field_that_makes_no_sense_is_named_with_what_was_found(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(**changes)
    assert message in str(caught.value)


@given(st.dictionaries(st.sampled_from(sorted(TINY)), st.none() | st.integers() | st.text(max_size=5) | st.floats()))
def test_any_values_parse_or_raise_our_error(changes: dict[str, Any]) -> None:
    try:
        parse(**changes)
    except InputError as error:
        assert error.where.startswith("config.json")  # noqa: PT017 - both outcomes are right


def test_layer_types_say_which_layers_forget() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    assert parse(sliding_window=8, layer_types=kinds).sliding_windows == (8, None, 8, None)
    assert parse(sliding_window=8).sliding_windows == (8,) * 4
    unused = parse(model_type="qwen2", sliding_window=8, use_sliding_window=False)
    assert unused.sliding_windows == (None,) * 4


def test_custom_code_is_noticed_and_quantisation_named() -> None:
    assert parse(auto_map={"AutoModel": "x.Y"}).runs_custom_code
    assert not parse().runs_custom_code
    assert parse(quantization_config={"quant_method": "awq"}).quantization == "awq"
    assert parse(quantization_config={}).quantization == "unknown"


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_absent_keys_mean_what_transformers_classes_mean(family: str) -> None:
    from transformers import AutoConfig

    shape = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 4, "intermediate_size": 64}
    live = AutoConfig.for_model(family, **shape)
    if live.num_key_value_heads > 32:
        pytest.skip("more KV heads than heads")
    ours = parse_config({"model_type": family, "vocab_size": 64} | shape, where="x")
    assert ours.num_key_value_heads == live.num_key_value_heads
    assert ours.head_dim == (getattr(live, "head_dim", None) or 4096 // 32)
    assert ours.tie_word_embeddings == live.tie_word_embeddings
    assert ours.max_position_embeddings == live.max_position_embeddings
    assert ours.num_experts == getattr(live, "num_local_experts", 0)
    window = getattr(live, "sliding_window", None)
    assert ours.sliding_windows[0] == window
    assert set(FAMILY_DEFAULTS) <= set(SUPPORTED_FAMILIES)


def test_a_configuration_file_is_identified_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    first = read_config(path)
    path.write_text(json.dumps(TINY) + "\n")
    assert read_config(path).sha256 != first.sha256
    assert len(first.sha256) == 64


@pytest.mark.parametrize("data", [b"[]", b'"text"', b"3"])
def test_a_configuration_is_an_object(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(InputError, match="not a JSON object"):
        read_config(tmp_path / "config.json")


@pytest.mark.row("P2")
@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"sliding_window": None},
        {"sliding_window": 6},
        {"sliding_window": 6, "use_sliding_window": True},
        {"sliding_window": 6, "use_sliding_window": False},
        {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 3},
        {"sliding_window": 6, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 4},
        {"sliding_window": 6, "use_sliding_window": True, "no_rope_layers": [0, 1, 1, 1, 1, 1, 1, 0]},
    ],
    ids=str,
)
def test_windows_are_those_that_transformers_keeps(family: str, keys: dict[str, Any]) -> None:
    from transformers import AutoConfig, DynamicCache

    if family == "gemma2" and keys == {"sliding_window": None}:
        pytest.skip("half of its layers slide: refused, see below")
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 8,
             "intermediate_size": 64, "vocab_size": 64}  # fmt: skip
    live = DynamicCache(config=AutoConfig.for_model(family, **shape, **keys))
    kept = tuple(getattr(layer, "sliding_window", None) for layer in live.layers)
    assert parse_config({"model_type": family} | shape | keys, where="x").sliding_windows == kept


@pytest.mark.row("P20")
@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_layers_that_slide_need_the_size_of_their_window(family: str) -> None:
    raw = {"model_type": family, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
           "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 64,
           "layer_types": ["sliding_attention", "full_attention"], "sliding_window": None}  # fmt: skip
    message = r"sliding_window: is (missing|false), and layers are of the kind"
    with pytest.raises(InputError, match=message):
        parse_config(raw, where="x")
    if family == "gemma2":
        with pytest.raises(InputError, match=message):
            parse_config(raw | {"layer_types": None}, where="x")


@pytest.mark.row("P20")
def test_a_null_is_refused_where_the_class_is_known_to_refuse_it() -> None:
    with pytest.raises(InputError, match="/rms_norm_eps: is null"):
        parse(rms_norm_eps=None)
    assert parse(model_type="cohere2_moe", rms_norm_eps=None).model_type == "cohere2_moe"  # as transformers writes it


@pytest.mark.row("P20")
def test_a_tie_that_is_null_is_refused_as_transformers_refuses_it() -> None:
    with pytest.raises(InputError, match="/tie_word_embeddings: is null; expected true or false"):
        parse(tie_word_embeddings=None)


@pytest.mark.row("P7")
@pytest.mark.parametrize(
    "name", ["LlamaForSequenceClassification", "Qwen2ForTokenClassification", "Qwen2ForRewardModel"]
)
def test_a_model_that_judges_texts_is_refused_by_its_class(name: str) -> None:
    with pytest.raises(InputError, match=f"/architectures/0: {name} judges texts and writes none"):
        parse(architectures=[name])


@pytest.mark.row("P20")
def test_the_old_name_of_the_quantization_config_is_not_overlooked() -> None:
    table = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    with pytest.raises(InputError, match=r"/compression_config: .* expected the same table under quantization_config"):
        parse(compression_config=table)
    assert parse(compression_config=table, quantization_config=table).quantization == "compressed-tensors"
