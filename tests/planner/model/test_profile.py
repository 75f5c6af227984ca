"""Checkpoint -> profile: sizes from headers, the cross-check with the formula, and models found by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.model import formula
from planner.model.find import find_model, model_name
from planner.model.profile import build_profile
from plans.checkpoint.folder import open_checkpoint
from plans.errors import InputError
from plans.profile import ModelProfile
from tests.planner.cases import TINY, bare, tiny_profile, write_checkpoint, write_safetensors

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def tensors_of(dtype: str = "BF16", **changes: Any) -> Tensors:
    """The tensors of TINY, by the formula that test_formula.py compares with transformers."""
    config = bare(**changes).config
    shapes = formula.embedding_shapes(config) | formula.head_shapes(config)
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in formula.layer_shapes(config).items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return {name: (dtype, shape) for name, shape in shapes.items()}


def profile_of(folder: Path, **options: Any) -> ModelProfile:
    return build_profile(open_checkpoint(folder), **options)


def test_a_layer_costs_what_its_tensors_say() -> None:
    layer = tiny_profile().layers[0]
    attention = 32 * 32 + 2 * 16 * 32 + 32 * 32  # q, k and v, o
    linear = attention + 3 * 32 * 48
    assert layer.parameters == linear + 2 * 32
    assert layer.weight_bytes == layer.decode_read_bytes == layer.stored_weight_bytes == 2 * layer.parameters
    assert layer.flops_per_token == 2 * linear
    assert layer.attention_flops_per_token_per_context == 4 * 4 * 8
    assert layer.kv_bytes_per_token == 2 * 2 * 8 * 2


def test_the_ends_cost_their_table_and_the_embedding_reads_one_row() -> None:
    profile = tiny_profile()
    assert profile.embedding.parameters == 64 * 32
    assert profile.embedding.decode_read_bytes == 32 * 2
    assert profile.embedding.flops_per_token == 0
    assert profile.head.parameters == 64 * 32 + 32
    assert profile.head.flops_per_token == 2 * 64 * 32
    assert profile.head.decode_read_bytes == profile.head.weight_bytes


def test_a_chosen_dtype_changes_bytes_but_not_parameters_flops_or_identity() -> None:
    stored, wide = tiny_profile(), build_profile(bare(), dtype="fp32", kv_cache_dtype="fp16")
    assert wide.total_parameters == stored.total_parameters
    assert wide.total_weight_bytes == 2 * stored.total_weight_bytes
    assert wide.layers[0].kv_bytes_per_token == stored.layers[0].kv_bytes_per_token
    assert wide.layers[0].stored_weight_bytes == stored.layers[0].stored_weight_bytes
    assert [unit.shapes_sha256 for unit in wide.units] == [unit.shapes_sha256 for unit in stored.units]


def test_identical_layers_share_their_hash_and_unlike_ones_do_not() -> None:
    assert len({layer.shapes_sha256 for layer in tiny_profile().layers}) == 1
    assert tiny_profile().layers[0].shapes_sha256 != tiny_profile(intermediate_size=64).layers[0].shapes_sha256
    assert tiny_profile().layers[0].shapes_sha256 != tiny_profile(dtype="float16").layers[0].shapes_sha256


def test_a_tied_table_is_counted_once_in_the_total_and_by_both_ends() -> None:
    tied, untied = tiny_profile(tie_word_embeddings=True), tiny_profile()
    assert tied.tied
    assert tied.total_parameters == untied.total_parameters - 64 * 32
    assert tied.head.weight_bytes == untied.head.weight_bytes


def test_headers_and_configuration_give_the_same_units(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", tensors_of())
    assert profile_of(folder).units == profile_of(folder / "config.json").units


def test_mixed_stored_dtypes_are_said_and_sized_at_the_dtype_of_the_configuration(tmp_path: Path) -> None:
    tensors = tensors_of() | {"model.norm.weight": ("F32", (32,))}
    profile = profile_of(write_checkpoint(tmp_path / "mixed", tensors))
    assert profile.model.stored_dtype == "mixed"
    assert profile.dtype == "bf16"
    assert profile.head.stored_weight_bytes == profile.head.weight_bytes + 2 * 32


def test_every_leftover_in_the_headers_is_named_with_its_size(tmp_path: Path) -> None:
    tensors = tensors_of() | {
        "model.layers.1.self_attn.rotary_emb.inv_freq": ("F32", (4,)),
        "model.vision.weight": ("F32", (8, 8)),
        "model.layers.0.self_attn.q_proj.bias": ("BF16", (32,)),
    }
    found = {d.name: d for d in profile_of(write_checkpoint(tmp_path / "more", tensors)).differences}
    assert set(found) == set(tensors) - set(tensors_of())
    assert found["model.layers.1.self_attn.rotary_emb.inv_freq"].size_bytes == 16
    assert "rotary" in found["model.layers.1.self_attn.rotary_emb.inv_freq"].note
    assert "left out" in found["model.vision.weight"].note
    assert "counted with its unit" in found["model.layers.0.self_attn.q_proj.bias"].note


def test_a_tied_head_that_was_stored_twice_is_named_and_counted_once(tmp_path: Path) -> None:
    config = TINY | {"tie_word_embeddings": True}
    once = write_checkpoint(tmp_path / "once", tensors_of(tie_word_embeddings=True), config)
    twice = write_checkpoint(tmp_path / "twice", tensors_of(), config)
    assert profile_of(once).units == profile_of(twice).units
    assert profile_of(once).total_weight_bytes == profile_of(twice).total_weight_bytes
    (difference,) = profile_of(twice).differences
    assert difference.name == "lm_head.weight"
    assert difference.size_bytes == 64 * 32 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.2.mlp.up_proj.weight": None}, r"no tensor model\.layers\.2\.mlp\.up_proj\.weight.*\[48, 32\]"),
        (
            {"model.layers.2.mlp.up_proj.weight": ("BF16", (47, 32))},
            r"model\.layers\.2\.mlp\.up_proj\.weight has shape \[47, 32\], config\.json implies \[48, 32\]",
        ),
        ({"model.norm.weight": ("BF16", (31,))}, r"model\.norm\.weight has shape \[31\].*\[32\]"),
        ({"model.embed_tokens.weight": ("BF16", (65, 32))}, r"embed_tokens.*\[65, 32\].*\[64, 32\]"),
        ({"lm_head.weight": None}, r"no tensor lm_head\.weight and tie_word_embeddings is false"),
        ({"model.layers.4.mlp.up_proj.weight": ("BF16", (48, 32))}, r"layer 4.*num_hidden_layers 4"),
    ],
)
def test_a_tensor_that_contradicts_the_configuration_is_refused_with_both_shapes(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors = {name: row for name, row in (tensors_of() | change).items() if row is not None}
    with pytest.raises(InputError, match=message):
        profile_of(write_checkpoint(tmp_path / "bad", tensors))


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    tensors = {name: row for name, row in tensors_of().items() if ".layers.2." not in name}
    with pytest.raises(InputError, match="no tensors of layer 2"):
        profile_of(write_checkpoint(tmp_path / "gap", tensors))


@given(layer=st.integers(0, 3), factor=st.integers(2, 3), data=st.data())
def test_any_single_wrong_shape_is_found(
    layer: int, factor: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors = tensors_of()
    name = data.draw(st.sampled_from([name for name in tensors if f".layers.{layer}." in name]))
    dtype, shape = tensors[name]
    folder = tmp_path_factory.mktemp("wrong")
    with pytest.raises(InputError, match="has shape"):
        profile_of(write_checkpoint(folder, tensors | {name: (dtype, (shape[0] * factor, *shape[1:]))}))


def test_an_unknown_family_is_sized_from_its_headers(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "other", tensors_of(), TINY | {"model_type": "exotic"})
    profile = profile_of(folder)
    assert profile.units == profile_of(write_checkpoint(tmp_path / "tiny", tensors_of())).units
    assert profile.model.model_type == "exotic"


def test_quantised_weights_keep_their_stored_size_and_stand_for_their_parameters(tmp_path: Path) -> None:
    packed: Tensors = {}
    for name, (dtype, shape) in tensors_of().items():
        if name.endswith("_proj.weight"):
            packed[name.removesuffix("weight") + "qweight"] = ("I32", (shape[1] // 8, shape[0]))
            packed[name.removesuffix("weight") + "scales"] = ("F16", (1, shape[0]))
            packed[name.removesuffix("weight") + "qzeros"] = ("I32", (1, shape[0] // 8))
        else:
            packed[name] = (dtype, shape)
    config = TINY | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    profile = profile_of(write_checkpoint(tmp_path / "gptq", packed, config), dtype="fp32")
    plain = tiny_profile()
    assert profile.model.quantization == "gptq"
    assert profile.layers[0].weight_bytes == profile.layers[0].stored_weight_bytes < plain.layers[0].weight_bytes / 2
    assert profile.total_parameters == plain.total_parameters
    assert profile.layers[0].flops_per_token == plain.layers[0].flops_per_token


def test_a_bare_quantised_configuration_says_that_its_sizes_are_those_of_the_unquantised_model() -> None:
    (difference,) = tiny_profile(quantization_config={"quant_method": "awq"}).differences
    assert "awq" in difference.note


def test_one_token_reads_only_its_active_experts() -> None:
    layer = tiny_profile(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2).layers[0]
    expert = 3 * 32 * 48
    assert layer.weight_bytes - layer.decode_read_bytes == 6 * expert * 2
    shared = 32 * 32 * 2 + 2 * 16 * 32 + 8 * 32  # attention and router
    assert layer.flops_per_token == 2 * (shared + 2 * expert)


def test_a_profile_reads_back_byte_for_byte() -> None:
    text = tiny_profile(tie_word_embeddings=True).to_json()
    assert ModelProfile.from_json(text.encode(), where="profile.json").to_json() == text


def test_a_model_beyond_64_bits_is_bad_input_and_no_bug() -> None:
    huge = {"hidden_size": 1 << 20, "intermediate_size": 1 << 24, "vocab_size": 1 << 24, "num_hidden_layers": 10_000}
    experts = {"num_local_experts": 4096, "model_type": "mixtral", "head_dim": 1 << 16}
    with pytest.raises(InputError, match="too large to size"):
        build_profile(bare(**huge, **experts))


# --- finding a model by what was typed ---------------------------------------------------------------------------


def cache(tmp_path: Path, *revisions: str, main: str | None = None) -> dict[str, str]:
    repository = tmp_path / "hub" / "models--org--tiny"
    for revision in revisions:
        (repository / "snapshots" / revision).mkdir(parents=True)
    repository.mkdir(parents=True, exist_ok=True)
    if main:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(main)
    return {"HF_HOME": str(tmp_path)}


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    assert find_model(str(tmp_path)) == tmp_path
    assert find_model("./no/such/folder") == Path("no/such/folder")


def test_a_cached_name_resolves_to_the_revision_main_points_to(tmp_path: Path) -> None:
    environment = cache(tmp_path, "aaa", "bbb", main="bbb")
    found = find_model("org/tiny", environment=environment)
    assert found.name == "bbb"
    assert model_name(found) == "org/tiny"


def test_the_only_snapshot_is_taken_where_main_is_not_marked(tmp_path: Path) -> None:
    assert find_model("org/tiny", environment=cache(tmp_path, "aaa")).name == "aaa"


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
def test_the_cache_itself_may_be_named(variable: str, tmp_path: Path) -> None:
    cache(tmp_path, "aaa")
    assert find_model("org/tiny", environment={variable: str(tmp_path / "hub")}).name == "aaa"


@pytest.mark.parametrize(
    ("revisions", "main", "message"),
    [((), None, "download is incomplete"), (("a", "b"), None, "2 snapshots"), (("a", "b"), "../..", "2 snapshots")],
)
def test_a_cached_model_without_one_clear_snapshot_is_refused(
    revisions: tuple[str, ...], main: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        find_model("org/tiny", environment=cache(tmp_path, *revisions, main=main))


def test_a_name_that_is_nowhere_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not in the Hugging Face cache.*hf download org/none"):
        find_model("org/none", environment={"HF_HOME": str(tmp_path)})


def test_a_snapshot_links_into_its_own_blobs_and_nowhere_else(tmp_path: Path) -> None:
    environment = cache(tmp_path, "aaa", main="aaa")
    snapshot = find_model("org/tiny", environment=environment)
    blobs = snapshot.parents[1] / "blobs"
    write_checkpoint(blobs, tensors_of())
    (snapshot / "config.json").symlink_to(blobs / "config.json")
    (snapshot / "model.safetensors").symlink_to(blobs / "model.safetensors")
    assert profile_of(snapshot).model.name == "org/tiny"
    outside = tmp_path / "outside.safetensors"
    write_safetensors(outside, tensors_of())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(outside)
    with pytest.raises(InputError, match="link out of the folder"):
        profile_of(snapshot)


def test_a_download_under_way_is_recognised(tmp_path: Path) -> None:
    snapshot = find_model("org/tiny", environment=cache(tmp_path, "aaa"))
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    (snapshot / "config.json").write_text(json.dumps(TINY))
    (blobs / "1234.incomplete").touch()
    with pytest.raises(InputError, match="download is incomplete"):
        profile_of(snapshot)
    (snapshot / "model.safetensors").symlink_to(blobs / "1234")
    with pytest.raises(InputError, match="download is incomplete"):
        profile_of(snapshot)


@pytest.mark.parametrize(
    ("path", "name"),
    [("models/llama-7b", "llama-7b"), ("models/llama-7b/config.json", "llama-7b"), ("configs/big.json", "big")],
)
def test_a_model_is_named_after_its_folder_or_file(path: str, name: str) -> None:
    assert model_name(Path(path)) == name


def test_a_profile_of_other_layers_than_it_says_is_refused_at_once() -> None:
    document = json.loads(tiny_profile().model_dump_json())
    for layers in (document["model"]["num_hidden_layers"] + 1, 7 * 10**15):  # as many names would not fit any memory
        document["model"]["num_hidden_layers"] = layers
        with pytest.raises(ValueError, match="units must be the embedding, layers 0 to"):
            ModelProfile.model_validate_json(json.dumps(document))
