"""From a folder to a chain: dtypes, devices, defaults."""

import json
from pathlib import Path

import pytest
import torch
from parity import reference_model, save_model, some_cut
from transformers import LlamaConfig

from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.run_dtype import run_dtype
from plans.errors import InputError, UsageError
from runtime import load
from runtime.reading.tensors import FolderTensors, torch_dtype


def test_one_stage_is_the_default_and_the_stored_dtype_is_kept(shipped: Path) -> None:
    chain = load(shipped)
    assert [(s.start_layer, s.end_layer, s.has_embedding, s.has_head) for s in chain.stages] == [(0, 7, True, True)]
    assert chain.dtype == torch.bfloat16
    assert chain.config.dtype == torch.bfloat16
    assert not chain.training


def test_the_checkpoints_generation_defaults_are_used(shipped: Path) -> None:
    assert load(shipped).generation_config == reference_model(shipped, dtype=torch.bfloat16).generation_config


def test_listing_tensors_opens_no_file(shipped: Path) -> None:
    tensors = FolderTensors(open_checkpoint(shipped))
    assert len(tensors) == len(list(tensors)) == 7 * 9 + 3
    assert "lm_head.weight" in tensors
    assert not tensors._open
    assert tensors["model.norm.weight"].shape == (192,)
    assert len(tensors._open) == 1


def test_a_device_map_moves_stages_by_index(tiny: Path) -> None:
    stages = [stage.__class__("cuda:7", *_rest(stage)) for stage in some_cut(4, 2, seed=3)]
    chain = load(tiny, stages=stages, device_map={0: "cpu", 1: "cpu#1"})
    assert chain.stage_devices == (torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(UsageError, match="the device map names stage 2; expected a stage from 0 to 1"):
        load(tiny, stages=stages, device_map={2: "cpu"})


def _rest(stage: object) -> tuple[int, int, bool, bool]:
    return stage.start_layer, stage.end_layer, stage.has_embedding, stage.has_head  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16), ("fp32", torch.float32)]
)
def test_dtypes_have_short_and_long_names(name: str, dtype: torch.dtype) -> None:
    assert torch_dtype(name) == dtype


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UsageError, match="dtype int8 is not known; expected fp32, bf16 or fp16"):
        torch_dtype("int8")


def test_without_a_dtype_in_the_config_the_tensors_decide(tmp_path: Path, tiny_config: LlamaConfig) -> None:
    folder = save_model(tiny_config, tmp_path, dtype=torch.float16)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert run_dtype(open_checkpoint(folder)) == "fp16"
    assert load(folder).dtype == torch.float16 == reference_model(folder, dtype="auto").dtype  # type: ignore[arg-type]


def test_an_unsupported_family_is_refused_before_anything_is_built(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "gpt_neox"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="model_type gpt_neox is not supported"):
        load(tmp_path)
