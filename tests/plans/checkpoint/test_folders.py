"""Folders as people have them: several models, adapters, other people's names, a cache, or no weights at all."""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from planner.model.profile import build_profile
from plans.checkpoint.cache import find_snapshot
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.header import read_header
from plans.checkpoint.names import canonical_names
from plans.checkpoint.units import require_full
from plans.config.config import parse_config
from plans.dtypes import STORED_DTYPES
from plans.errors import InputError
from tests.conftest import RunCommand
from tests.planner.cases import TINY, tiny_profile, write_safetensors
from tests.planner.model.test_profile import tensors_of, write_checkpoint

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Rows = Mapping[str, tuple[str, tuple[int, ...]]]


def write_shards(folder: Path, rows: Rows, *, index: bool = True) -> list[str]:
    """Write tensors as two shards."""
    names = sorted(rows)
    files = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, part in files.items():
        write_safetensors(folder / file, {name: rows[name] for name in part})
    weight_map = {name: file for file, part in files.items() for name in part}
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sorted(files)


def change_a_byte(path: Path, name: str, *, at: int = -1) -> None:
    """Change one byte of a tensor, its last if nothing else is said."""
    entry = read_header(path).tensors[name]
    data = bytearray(path.read_bytes())
    data[entry.end + at if at < 0 else entry.begin + at] ^= 1
    path.write_bytes(data)


# --- P3: two answers to "which files" -----------------------------------------------------------------------------


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """One model, once as shards with an index and once as one file."""
    folder = write_checkpoint(tmp_path / "both", tensors_of())
    write_shards(folder, tensors_of())
    return folder


@pytest.mark.row("P3")
def test_an_index_and_one_file_with_the_same_tensors_are_fine(both: Path) -> None:
    checkpoint = open_checkpoint(both)
    assert len(checkpoint.shards) == 2
    assert "hold the same tensors; the index is used" in checkpoint.warnings[0]


OTHER_MODELS: dict[str, Callable[[Path], object]] = {
    "another value, far behind": lambda both: change_a_byte(both / SINGLE, "model.norm.weight"),
    "a tensor more": lambda both: write_safetensors(both / SINGLE, {**tensors_of(), "extra": ("BF16", (2,))}),
    "a tensor less": lambda both: write_safetensors(
        both / SINGLE, {n: row for n, row in tensors_of().items() if n != "model.norm.weight"}
    ),
    "another dtype": lambda both: write_safetensors(
        both / SINGLE, {name: ("F16", shape) for name, (_dtype, shape) in tensors_of().items()}
    ),
}


@pytest.mark.row("P3")
@pytest.mark.parametrize("change", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_an_index_and_one_file_of_two_models_are_refused_and_both_named(
    change: Callable[[Path], object], both: Path
) -> None:
    change(both)
    with pytest.raises(InputError, match=rf"{INDEX} and {SINGLE} belong to two models: .*expected one model"):
        open_checkpoint(both)


@pytest.mark.row("P3")
@pytest.mark.parametrize("num_missing", [1, 2])
def test_one_complete_file_is_used_where_those_of_the_index_are_missing(num_missing: int, both: Path) -> None:
    for name in sorted(both.glob("model-*"))[:num_missing]:
        name.unlink()
    checkpoint = open_checkpoint(both)
    assert [shard.name for shard in checkpoint.shards] == [SINGLE]
    (said,) = checkpoint.warnings
    assert "model-00001-of-00002.safetensors" in said
    assert f"{SINGLE} is complete and is used" in said


@pytest.mark.row("P3")
def test_the_rest_of_another_models_shards_is_not_overlooked(both: Path) -> None:
    (both / "model-00001-of-00002.safetensors").unlink()
    name = min(read_header(both / "model-00002-of-00002.safetensors").tensors)
    change_a_byte(both / SINGLE, name)
    with pytest.raises(InputError, match=f"two models: they differ in {name}"):
        open_checkpoint(both)


@pytest.mark.row("P3")
def test_one_file_that_is_not_the_whole_model_does_not_replace_missing_shards(both: Path) -> None:
    for path in both.glob("model-*"):
        path.unlink()
    rows = {name: row for name, row in tensors_of().items() if ".layers.3." not in name}
    write_safetensors(both / SINGLE, rows)
    with pytest.raises(InputError, match=r"lists model-00001.*missing.*is not the whole model: no tensors of layer 3"):
        open_checkpoint(both)


NOT_READ = "files that seem to be parts of the model are not read, as no index lists them: "
STRAYS: dict[str, Rows] = {
    "model-00003-of-00003.safetensors": {"anything": ("F16", (2,))},
    "extra.safetensors": {"model.layers.3.mlp.up_proj.bias": ("F16", (2,))},
    "wrapped.safetensors": {"_orig_mod.model.layers.3.mlp.up_proj.bias": ("F16", (2,))},
}
NO_STRAYS: dict[str, Rows] = {
    "consolidated.safetensors": {"layers.0.attention.wq.weight": ("F16", (2,))},
    "consolidated-00001-of-00001.safetensors": {"norm.weight": ("F16", (2,))},
    "adapter_model.safetensors": {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": ("F16", (2,))},
}


@pytest.mark.parametrize("is_indexed", [True, False])
@pytest.mark.parametrize("name", STRAYS)
def test_a_file_that_may_be_a_part_and_is_in_no_index_is_named(name: str, is_indexed: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tensors_of())
    if is_indexed:
        write_shards(folder, tensors_of())
        (folder / SINGLE).unlink()
    write_safetensors(folder / name, STRAYS[name])
    assert open_checkpoint(folder).warnings == (NOT_READ + name,)


def test_a_stray_file_that_cannot_be_read_is_named_and_stops_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tensors_of())
    (folder / "a.safetensors").write_bytes(b"not one")
    assert open_checkpoint(folder).warnings == (NOT_READ + "a.safetensors",)


def test_weights_without_a_configuration_are_not_blamed_for_their_name(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path / "m", tensors_of()) / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json in the folder"):
        open_checkpoint(tmp_path / "m")


def test_shards_with_their_index_and_no_configuration_lack_the_configuration(shipped: Path, tmp_path: Path) -> None:
    shutil.copytree(shipped, tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json in the folder"):
        open_checkpoint(tmp_path / "m")


def test_an_index_in_place_of_its_folder_is_named(shipped: Path) -> None:
    with pytest.raises(InputError, match=rf"is the index of a checkpoint; give its folder: {shipped}"):
        open_checkpoint(shipped / "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("https://huggingface.co/org/name/tree/main", r"download it first: hf download org/name, then give org/name$"),
        ("HTTPS://hf.co/org/name", "hf download org/name"),
        ("https://example.org/model.gguf", "nothing is fetched from the network"),
        ("file:///srv/model", "nothing is fetched from the network"),
    ],
)
def test_an_address_is_told_that_nothing_is_fetched(address: str, says: str, run_command: RunCommand) -> None:
    done = run_command("llamaplan", "analyze", address)
    assert done.code == 3
    assert re.search(says, done.err.strip())


@pytest.mark.parametrize("name", NO_STRAYS)
def test_a_file_that_is_no_part_of_the_model_is_left_alone(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tensors_of())
    write_safetensors(folder / name, NO_STRAYS[name])
    assert not any(NOT_READ in said for said in open_checkpoint(folder).warnings)


def test_every_command_warns_of_a_stray_file(run_command: RunCommand, tmp_path: Path) -> None:
    folder, stray = write_checkpoint(tmp_path / "m", tensors_of()), "model-00003-of-00003.safetensors"
    write_safetensors(folder / stray, STRAYS[stray])
    plan, out = tmp_path / "plan.json", tmp_path / "shards"
    for arguments in (
        ("analyze", folder),
        ("solve", folder, "--device", "cpu=4GiB", "-o", plan),
        ("export", plan, "--model", folder, "-o", out),
        ("verify", out, "--model", folder),
    ):
        done = run_command("llamaplan", *arguments)
        assert done.code == 0, done.err
        assert done.err.count(f"{NOT_READ}{stray}") == 1, arguments


# --- P4: a head of its own beside a claimed tie --------------------------------------------------------------------

TIED = TINY | {"tie_word_embeddings": True}
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.row("P4")
@pytest.mark.parametrize("at", [0, -1])
def test_a_head_of_other_values_is_counted_although_the_config_says_tied(at: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tensors_of(), TIED)
    assert build_profile(open_checkpoint(folder)).tied
    change_a_byte(folder / SINGLE, HEAD, at=at)
    checkpoint = open_checkpoint(folder)
    profile = build_profile(checkpoint)
    assert not profile.tied
    assert profile.total_weight_bytes == tiny_profile().total_weight_bytes
    assert not profile.differences
    assert "says the head is tied, but lm_head.weight does not hold" in checkpoint.warnings[0]


@pytest.mark.row("P4")
@pytest.mark.parametrize(
    ("stored", "dtype", "is_tied"),
    [("F32", "bfloat16", True), ("F16", "float32", True), ("F64", "bfloat16", False)],
)
def test_a_copy_in_another_dtype_is_compared_in_the_dtype_that_runs(
    stored: str, dtype: str, is_tied: bool, tmp_path: Path
) -> None:
    rows = tensors_of() | {HEAD: (stored, (64, 32))}
    folder = write_checkpoint(tmp_path / "m", rows, TIED | {"dtype": dtype})
    assert open_checkpoint(folder).config.tie_word_embeddings is is_tied
    if is_tied:
        width = STORED_DTYPES[stored].size_bytes
        change_a_byte(folder / SINGLE, HEAD, at=-width)  # the lowest bit of the last element
        is_rounded_away = dtype == "bfloat16"
        assert open_checkpoint(folder).config.tie_word_embeddings is is_rounded_away


# --- P7: what else lies where a model should -----------------------------------------------------------------------

INSTEAD: dict[str, tuple[dict[str, str], str]] = {
    "an adapter": (
        {"adapter_config.json": '{"base_model_name_or_path": "org/base"}', "adapter_model.safetensors": ""},
        "holds an adapter for org/base, not a model.*merge it",
    ),
    "an adapter with a broken configuration": ({"adapter_config.json": "{"}, "holds an adapter, not a model"),
    "consolidated safetensors": ({"consolidated.safetensors": "", "params.json": "{}"}, "vendor's own format.*convert"),
    "consolidated parts": ({"consolidated.00.pth": "", "params.json": "{}"}, "consolidated.00.pth.*vendor's own"),
    "Flax": ({"flax_model.msgpack": ""}, "flax_model.msgpack, which is not safetensors.*save_pretrained"),
    "TensorFlow": ({"tf_model.h5": ""}, "tf_model.h5, which is not safetensors"),
    "NumPy": ({"weights.npz": ""}, "weights.npz, which is not safetensors"),
    "parts without their index": ({"model-1-of-2.safetensors": ""}, "model-1-of-2.*neither.*fetch the index"),
    "another name": ({"weights.safetensors": ""}, "weights.safetensors, which is neither.*rename"),
}


@pytest.mark.row("P7")
@pytest.mark.parametrize("has_config", [False, True])
@pytest.mark.parametrize("what", INSTEAD)
def test_what_lies_in_place_of_weights_is_said_and_what_to_do(what: str, has_config: bool, tmp_path: Path) -> None:
    files, message = INSTEAD[what]
    for name, text in (files | ({"config.json": json.dumps(TINY)} if has_config else {})).items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.row("P7")
def test_an_adapter_beside_its_model_is_said_not_to_be_applied(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tensors_of())
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter lies beside the weights; it is not applied" in open_checkpoint(folder).warnings[0]


@pytest.mark.row("P7")
def test_shards_without_an_index_are_read_by_their_headers_if_all_are_there(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tensors_of())
    whole = build_profile(open_checkpoint(folder))
    (folder / SINGLE).unlink()
    files = write_shards(folder, tensors_of(), index=False)
    checkpoint = open_checkpoint(folder)
    assert build_profile(checkpoint).units == whole.units
    assert f"no {INDEX}: the headers of all 2 shards are read" in checkpoint.warnings[0]
    (folder / files[0]).unlink()
    with pytest.raises(InputError, match=r"holds 1 of 2 shards and no .*index\.json: number 1 is missing"):
        open_checkpoint(folder)


@pytest.mark.row("P7")
def test_shards_of_two_cuts_without_an_index_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tensors_of())
    (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
    write_shards(folder, tensors_of(), index=False)
    with pytest.raises(InputError, match="shards of 1 and of 2 files"):
        open_checkpoint(folder)


@pytest.mark.row("P7")
def test_a_folder_with_a_configuration_alone_is_sized_by_formula_and_cannot_be_exported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert build_profile(checkpoint).units == tiny_profile().units
    assert "sizes come from config.json alone" in checkpoint.warnings[0]
    with pytest.raises(InputError, match=rf"only a configuration.*expected {SINGLE}, or {INDEX}"):
        require_full(checkpoint)


PREFIXES: dict[str, Callable[[str], str]] = {
    "peft": lambda name: f"base_model.model.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of each layer": lambda name: name.replace(".mlp.", ".mlp._orig_mod."),
    "data parallel": lambda name: f"module.{name}",
    "the base model alone": lambda name: name.removeprefix("model."),
    "all of them": lambda name: f"module._orig_mod.base_model.model.{name}",
}


@pytest.mark.row("P7")
@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_trainers_put_before_names_is_taken_away_and_said(prefix: str, tmp_path: Path) -> None:
    rows = {PREFIXES[prefix](name): row for name, row in tensors_of().items()}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", rows))
    assert build_profile(checkpoint).units == tiny_profile().units
    assert "names are read without what was put in front" in checkpoint.warnings[0]
    assert {stored.name for stored in checkpoint.tensors.values()} == set(rows)


def test_two_names_for_one_tensor_are_refused() -> None:
    with pytest.raises(InputError, match=r"module\.lm_head\.weight and lm_head\.weight are both lm_head\.weight"):
        canonical_names(["module.lm_head.weight", "lm_head.weight"], where="here")


@pytest.mark.row("P7")
def test_an_adapter_that_was_never_merged_is_refused(tmp_path: Path) -> None:
    part = "self_attn.q_proj"
    rows = {f"base_model.model.{n}".replace(part, f"{part}.base_layer"): row for n, row in tensors_of().items()}
    rows |= {f"base_model.model.model.layers.0.{part}.lora_A.default.weight": ("BF16", (4, 32))}
    with pytest.raises(InputError, match=r"adapter that was never merged.*merge_and_unload"):
        open_checkpoint(write_checkpoint(tmp_path / "m", rows))


@pytest.mark.row("P7")
@pytest.mark.parametrize("head", [None, "lm_head.weight", "language_model.lm_head.weight"])
@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("text_config", "model.language_model."),
        ("text_config", "language_model.model."),
        ("text_config", "model.text_model."),
        ("llm_config", "language_model.model."),
        ("llm_config", "llm.model."),
        ("language_config", "language.model."),
        ("thinker_config", "thinker.model."),
    ],
)
def test_the_text_part_of_a_larger_model_is_planned_and_the_rest_said(
    key: str, prefix: str, head: str | None, tmp_path: Path
) -> None:
    rows = {n.replace("model.", prefix, 1): r for n, r in tensors_of().items() if n != HEAD}
    rows |= {head: ("BF16", (64, 32))} if head else {}
    rows |= {"vision_tower.blocks.0.weight": ("BF16", (8, 8)), "model.projector.weight": ("BF16", (4, 4))}
    text = {key: value for key, value in TINY.items() if key != "dtype"}
    inner = {"model_type": "thinker", "text_config": text} if key == "thinker_config" else text
    config = {"model_type": "seeing", key: inner, "vision_config": {}, "torch_dtype": "bfloat16"}
    folder = write_checkpoint(tmp_path / "m", rows, config)
    checkpoint = open_checkpoint(folder)
    profile = build_profile(checkpoint)
    assert profile.units == tiny_profile(tie_word_embeddings=True).units  # a copy, or none
    assert profile.dtype == "bf16"
    assert "only the text part (llama) of this seeing model is read; 2 tensors (160 bytes)" in checkpoint.warnings[-1]
    assert "projector, vision_tower" in checkpoint.warnings[-1]
    if head:
        change_a_byte(folder / SINGLE, head)
        assert not open_checkpoint(folder).config.tie_word_embeddings


@pytest.mark.row("P7")
def test_two_text_models_in_one_configuration_are_refused_unless_they_are_one() -> None:
    raw = {"model_type": "seeing", "text_config": TINY, "llm_config": dict(TINY)}
    assert parse_config(raw, where="config.json").part_of == "seeing"
    with pytest.raises(InputError, match=r"config\.json:/llm_config: text_config and llm_config are two text models"):
        parse_config(raw | {"llm_config": TINY | {"num_hidden_layers": 3}}, where="config.json")


@pytest.mark.row("P7")
@pytest.mark.parametrize(
    ("raw", "what"),
    [
        ({"text_config": "llama"}, "/text_config: is not a table"),
        ({"llm_config": [TINY]}, "/llm_config: is not a table"),
        ({"thinker_config": {"text_config": 1}}, "/text_config: is not a table"),
        ({"thinker_config": TINY}, "/thinker_config: holds the sizes of a model"),
        ({"text_config": {"model_type": "x", "text_config": TINY}}, "/text_config: holds the sizes of a model"),
        ({"decoder": TINY, "vision_config": TINY}, "/decoder: holds the sizes of a model"),
    ],
    ids=str,
)
def test_a_text_model_in_an_odd_place_is_named(raw: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        parse_config({"model_type": "seeing"} | raw, where="config.json")


@pytest.mark.row("P7")
@pytest.mark.parametrize(("family", "is_known"), [("llama", True), ("gemma3_text", True), ("other", False)])
def test_sizes_that_a_text_part_leaves_to_its_class_are_the_classes_or_refused_by_key(
    family: str, is_known: bool, tmp_path: Path
) -> None:
    raw = {"model_type": "seeing", "text_config": {"model_type": family, "num_hidden_layers": 3}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if not is_known:
        with pytest.raises(InputError, match="/num_attention_heads: is missing"):
            open_checkpoint(tmp_path)
        return
    from transformers import CONFIG_MAPPING

    config, reference = open_checkpoint(tmp_path).config, CONFIG_MAPPING[family](num_hidden_layers=3)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(config, key) == getattr(reference, key)


def repository(root: Path, *revisions: str, main: str | None = None) -> Path:
    """A repository of the Hugging Face cache whose snapshots hold TINY."""
    folder = root / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "snapshots").mkdir()
    for revision in revisions:
        write_checkpoint(folder / "snapshots" / revision, tensors_of())
    if main is not None:
        (folder / "refs" / "main").write_text(main)
    return folder


@pytest.mark.row("P7")
def test_a_repository_of_the_cache_may_be_given_as_a_folder(tmp_path: Path) -> None:
    folder = repository(tmp_path, "aaa", "bbb", main="bbb")
    for path in (folder, folder / "snapshots"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.path == folder / "snapshots" / "bbb"
        assert build_profile(checkpoint).model.name == "org/tiny"
    with pytest.raises(InputError, match=r"is a cache of 1 models: org/tiny; give one of them"):
        open_checkpoint(tmp_path)


@pytest.mark.row("P7")
@pytest.mark.parametrize(
    ("revisions", "message"), [(("a", "b"), "2 snapshots.*: a, b"), ((), "download is incomplete")]
)
def test_a_repository_without_one_clear_snapshot_says_which(
    revisions: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        find_snapshot(repository(tmp_path, *revisions))


def test_a_folder_of_ones_own_that_is_called_snapshots_is_no_cache(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "snapshots", tensors_of())
    assert open_checkpoint(folder).path == folder


# --- P6: what quantised weights cannot be read without ---------------------------------------------------------------

QUANTISED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("fp8", {HEAD: ("F8_E4M3", (64, 32)), "lm_head.weight_scale_inv": ("F32", (1, 1))}),
    "packed": (
        "compressed-tensors",
        {"lm_head.weight_packed": ("I32", (64, 4)), "lm_head.weight_scale": ("BF16", (64, 1))},
    ),
    "gptq": (
        "gptq",
        {"lm_head.qweight": ("I32", (4, 64)), "lm_head.scales": ("F16", (1, 64)), "lm_head.qzeros": ("I32", (1, 8))},
    ),
    "4 bits": ("bitsandbytes", {HEAD: ("U8", (1024, 1)), "lm_head.weight.absmax": ("F32", (32,))}),
}


@pytest.mark.row("P6")
@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("says_tied", [False, True])
def test_a_quantised_head_is_a_head_with_its_scales(kind: str, says_tied: bool, tmp_path: Path) -> None:
    method, head = QUANTISED[kind]
    rows = {name: row for name, row in tensors_of().items() if name != HEAD} | head
    config = TINY | {"quantization_config": {"quant_method": method}, "tie_word_embeddings": says_tied}
    profile = build_profile(open_checkpoint(write_checkpoint(tmp_path / "m", rows, config)))
    stored = sum(STORED_DTYPES[dtype].size_bytes * math.prod(shape) for dtype, shape in head.values())
    assert not profile.tied
    assert profile.head.weight_bytes == stored + 32 * 2
    assert not profile.differences


@pytest.mark.row("P6")
def test_a_quantised_model_without_a_head_is_still_refused(tmp_path: Path) -> None:
    rows = {n: r for n, r in tensors_of().items() if n != HEAD} | {"lm_head.weight_scale": ("F32", (1,))}
    config = TINY | {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(InputError, match=r"no tensor lm_head\.weight and tie_word_embeddings is false"):
        open_checkpoint(write_checkpoint(tmp_path / "m", rows, config))
