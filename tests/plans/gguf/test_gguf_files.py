"""GGUF files as checkpoints: names, split files, architectures and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.units import require_full
from plans.errors import ExitCode, InputError, LlamaplanError
from plans.gguf.names import LAYER_NAMES
from tests.gguf_files import config_for, write_gguf


def write_other(path: Path, architecture: str, *, tensors: tuple[str, ...] = ()) -> Path:
    """Write a file of another architecture, or with other tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for name in tensors:
        writer.add_tensor(name, np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["qwen3moe", "gpt2", "clip", "deepseek2", "../llama"])
def test_an_architecture_that_is_not_known_is_refused_by_its_name(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"is of architecture {architecture}, whose tensors") as caught:
        open_checkpoint(write_other(tmp_path / "a.gguf", architecture))
    assert all(name in caught.value.expected for name in LAYER_NAMES)


def test_an_architecture_has_the_tensors_that_the_package_lists_for_it(tmp_path: Path) -> None:
    """But for rotary tables that old converters wrote, and weights apart that phi3's are one of."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    known_elsewhere = {"attn_rot_embd", "token_embd", "output_norm", "output"}
    for architecture, names in LAYER_NAMES.items():
        listed = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[numbers[architecture]]}
        parts = {name.removeprefix("blk.{bid}.") for name in listed if "_exp" not in name and "rope" not in name}
        apart = {"attn_q", "attn_k", "attn_v"} if architecture == "phi3" else set()
        assert parts - known_elsewhere - apart - {"ffn_gate_inp"} == set(names), architecture


def test_a_rotary_table_is_no_weight(tmp_path: Path) -> None:
    """Llama 3.1's rope scaling lies in a tensor."""
    path = write_gguf(tmp_path / "a.gguf", config_for("llama"), more={"rope_freqs.weight": (8,)})
    plain = write_gguf(tmp_path / "b.gguf", config_for("llama"))
    assert open_checkpoint(path).tensors.keys() - open_checkpoint(plain).tensors.keys() == {"rope_freqs.weight"}


def test_a_tensor_that_the_architecture_does_not_have_is_refused(tmp_path: Path) -> None:
    for name in ("blk.0.attn_qkv.weight", "blk.0.ffn_up_exps.weight", "blk.0.attn_q.scales", "mm.0.weight"):
        path = write_gguf(tmp_path / "a.gguf", config_for("llama"), more={name: (64, 64)})
        with pytest.raises(InputError, match=f"tensor '{name}' is not known of architecture llama"):
            open_checkpoint(path)


def test_a_scale_beside_weights_that_need_none_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", config_for("llama"), more={"blk.0.attn_q.scale": (1,)})
    with pytest.raises(InputError, match=r"blk\.0\.attn_q\.scale is F32 of shape \[1\], beside a weight in Q4_0"):
        open_checkpoint(path)


def test_experts_stored_together_are_apart_in_the_model(tmp_path: Path) -> None:
    found = open_checkpoint(write_gguf(tmp_path / "a.gguf", config_for("mixtral"))).tensors
    experts = [found[f"model.layers.1.block_sparse_moe.experts.{i}.w3.weight"].entry for i in range(4)]
    assert {entry.shape for entry in experts} == {(128, 64)}
    assert [entry.begin for entry in experts[1:]] == [entry.end for entry in experts[:-1]]


Change = Callable[[Path], Path]


def remove(number: int) -> Change:
    return lambda first: first.with_name(f"a-0000{number}-of-00003.gguf").unlink() or first  # type: ignore[func-returns-value]


def other_part(first: Path) -> Path:
    """The last part of another model in place of this one's."""
    (first.parent / "other").mkdir()
    other = write_gguf(first.parent / "other" / "a{}.gguf", config_for("llama", num_hidden_layers=4))
    shutil.copy(other.with_name("a-00003-of-00003.gguf"), first.with_name("a-00003-of-00003.gguf"))
    return first


SPLITS: dict[str, tuple[Change, str]] = {
    "a part is missing": (remove(3), "part 3 of 3 is missing: a-00003-of-00003.gguf"),
    "not the first": (
        lambda first: first.with_name("a-00002-of-00003.gguf"), "is part 2 of 3; give the first: .*a-00001-of-00003"),
    "another name": (
        lambda first: first.rename(first.with_name("b.gguf")), "name says part 1 of 1, its header part 1 of 3"),
    "another count": (
        lambda first: first.rename(first.with_name("a-00001-of-00004.gguf")), "part 1 of 4, its header part 1 of 3"),
    "parts that changed places": (
        lambda first: Path(shutil.copy(first, first.with_name("a-00002-of-00003.gguf"))) and first,
        "name says part 2 of 3, its header part 1 of 3"),
    "a part of another model": (other_part, "the 3 parts hold|is in a-0000"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLITS)
def test_parts_that_do_not_belong_together_are_refused(case: str, tmp_path: Path) -> None:
    change, words = SPLITS[case]
    path = change(write_gguf(tmp_path / "a{}.gguf", config_for("llama")))
    with pytest.raises(LlamaplanError, match=words) as caught:
        open_checkpoint(path)
    assert caught.value.exit_code in (ExitCode.BAD_INPUT, ExitCode.INTEGRITY)


def test_a_file_is_no_folder_to_run_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a GGUF file; .*llamaplan export PLAN .*emit PLAN --for llama\.cpp"):
        require_full(open_checkpoint(write_gguf(tmp_path / "a.gguf", config_for("llama"))))


def test_a_folder_with_a_gguf_file_alone_says_to_give_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", config_for("llama"))
    with pytest.raises(InputError, match=r"holds a\.gguf, .*give the file itself: .*/a\.gguf"):
        open_checkpoint(tmp_path)
