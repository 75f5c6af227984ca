"""Exports that round weights on the way: the same bytes whatever the threads, and what every reader makes of them."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from export_helpers import make_plan, names, tensor_bytes, tree
from packing_helpers import dequantised, edit_tensor, packed_plan

from exporter import export, verify
from exporter.packing import nearest
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.header import read_header
from plans.errors import InputError, IntegrityError, LlamaplanError, UsageError
from plans.export.opening import open_export
from plans.packed import rounding
from plans.packed.kernel import find_kernel
from tests.exporter.disk.test_export_atomic import Counter, count_calls, in_child, watched

Models = Callable[..., Path]
EVEN = {"intermediate_size": 64, "hidden_size": 64, "num_key_value_heads": 2, "num_hidden_layers": 3}


@pytest.fixture
def model(models: Models) -> Path:
    """Every side of its matrices is a multiple of 32."""
    return models(**EVEN)


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.arange(3, 15).reshape(2, 6)).logits


@pytest.mark.parametrize("bits", [4, 8])
def test_every_packed_matrix_has_the_bytes_of_the_format(model: Path, tmp_path: Path, bits: int) -> None:
    export(packed_plan(model, [2, 1], bits=bits), model=model, output=tmp_path / "out")
    stored = tensor_bytes(tmp_path / "out")
    matrices = {
        name.removesuffix(".weight"): tensor.entry.shape
        for name, tensor in open_checkpoint(model).tensors.items()
        if "_proj" in name
    }
    assert len(matrices) == 21
    for module, (out, in_) in matrices.items():
        packed = len(stored[f"{module}.weight_packed"]) + len(stored[f"{module}.weight_scale"])
        assert packed == out * (in_ // (2 if bits == 4 else 1) + in_ // 16)
        assert f"{module}.weight" not in stored


def test_weights_and_scales_begin_on_cache_lines(model: Path, tmp_path: Path) -> None:
    export(packed_plan(model, [2, 1], bits=4), model=model, output=tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        entries = read_header(path).tensors
        assert sum(name.endswith("weight_shape") for name in entries) % 4, "two numbers each are no whole lines"
        assert all(entry.begin % 64 == 0 for entry in entries.values() if entry.size_bytes % 64 == 0)
        assert all(entry.begin % 8 == 0 for entry in entries.values())


def test_equal_input_gives_equal_bytes_whatever_the_threads_and_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = packed_plan(model, [1, 2], bits=[4, 8, 4], head_bits=8)
    whole = export(plan, model=model, output=tmp_path / "1", threads=1)
    monkeypatch.setattr(nearest, "RUN_ELEMENTS", 96)
    for threads in (2, 4):
        assert export(plan, model=model, output=tmp_path / str(threads), threads=threads) == whole
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "4")


@pytest.fixture
def fresh_kernel() -> Iterator[None]:
    """Nobody has looked for the compiled rounding yet, and what is found is forgotten."""
    find_kernel.cache_clear()
    yield
    find_kernel.cache_clear()


@pytest.mark.usefixtures("fresh_kernel")
@pytest.mark.parametrize("compiler", [None, "exit 3", 'while [ "$1" != -o ]; do shift; done; echo odd > "$2"'])
def test_without_a_compiler_that_works_the_bytes_are_the_same_and_the_reason_is_said(
    compiler: str | None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, said = packed_plan(model, [1, 2], bits=[4, 8, 4], head_bits=8), []
    manifest = export(plan, model=model, output=tmp_path / "compiled", note=said.append)
    assert not said
    find_kernel.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    if compiler is not None:
        (tmp_path / "cc").write_text(f"#!/bin/sh\n{compiler}\n")
        (tmp_path / "cc").chmod(0o755)
    assert export(plan, model=model, output=tmp_path / "numpy", note=said.append) == manifest
    assert tree(tmp_path / "numpy") == tree(tmp_path / "compiled")
    (line,) = said
    assert line.startswith("weights are rounded several times slower without compiled code: ")
    assert str(tmp_path / "cc") in line or "rounding" in line
    assert verify(tmp_path / "compiled", model=model).method == "nearest"


@pytest.mark.usefixtures("fresh_kernel")
@pytest.mark.parametrize("cache", ["new", "a file in its place"])
def test_where_there_is_a_compiler_its_code_rounds_and_checks_what_was_rounded(
    cache: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("numpy was asked")

    if cache != "new":
        (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rounding, "round_blocks", refuse)
    export(packed_plan(model, [2, 1], bits=4), model=model, output=tmp_path / "out")
    assert verify(tmp_path / "out", model=model).method == "nearest"


@pytest.mark.parametrize(
    ("dtype", "bits", "head_bits"),
    [("bfloat16", 4, 8), ("bfloat16", (8, 4, 8), 16), ("float16", 4, 16), ("bfloat16", (16, 8, 8), 8)],
)
def test_transformers_loads_a_packed_export_with_the_logits_of_its_numbers_times_scales(
    models: Models, tmp_path: Path, dtype: str, bits: Any, head_bits: int
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = models(dtype=dtype, **EVEN)
    plan, said = packed_plan(model, [1, 1, 1], bits=bits, head_bits=head_bits), []
    export(plan, model=model, output=tmp_path / "out", note=said.append)
    assert not any("tied" in note for note in said)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    reference = AutoModelForCausalLM.from_pretrained(model)
    reference.load_state_dict(dequantised(tmp_path / "out"))
    assert loaded.dtype is getattr(torch, dtype)
    assert torch.equal(logits(loaded), logits(reference))


def test_a_tied_head_stays_with_its_embedding(models: Models, tmp_path: Path) -> None:
    model = models(tie_word_embeddings=True, **EVEN)
    export(packed_plan(model, [2, 1], bits=8), model=model, output=tmp_path / "out")
    stored, original = tensor_bytes(tmp_path / "out"), tensor_bytes(model)
    table = original["model.embed_tokens.weight"]
    assert stored["lm_head.weight"] == stored["model.embed_tokens.weight"] == table
    assert verify(tmp_path / "out", model=model).num_tensors_compared == len(stored)
    with pytest.raises(UsageError, match="shares the embedding's table"):
        export(packed_plan(model, [2, 1], head_bits=8), model=model, output=tmp_path / "no")


def test_matrices_with_an_odd_side_stay_as_they_are_and_this_is_said(models: Models, tmp_path: Path) -> None:
    model, said = models(hidden_size=64, num_hidden_layers=2), []
    export(packed_plan(model, [2], bits=4), model=model, output=tmp_path / "out", note=said.append)
    assert said[0].startswith("model.layers.0.mlp.down_proj.weight (64 x 48) and 5 more matrices stay as they are")
    stored, original = tensor_bytes(tmp_path / "out"), tensor_bytes(model)
    assert all(stored[name] == data for name, data in original.items() if "mlp" in name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.up_proj" in config["ignore"]
    assert "model.layers.0.self_attn.q_proj" not in config["ignore"]
    verify(tmp_path / "out", model=model)
    odd = models(hidden_size=40, num_hidden_layers=2)
    with pytest.raises(InputError, match="none of its matrices can be packed"):
        export(packed_plan(odd, [2], bits=4), model=odd, output=tmp_path / "no")


def test_weights_of_four_bytes_are_rounded_once_and_the_rest_becomes_bf16(models: Models, tmp_path: Path) -> None:
    model = models(dtype="float32", **EVEN)
    plan = packed_plan(model, [3], bits=8, dtype="bf16")
    manifest = export(plan, model=model, output=tmp_path / "out")
    assert manifest.dtype == "bf16"
    assert {unit.scheme for unit in manifest.packing.units} == {"int8 g32"} if manifest.packing else False
    verify(tmp_path / "out", model=model)
    with pytest.raises(UsageError, match="scales of packed weights have 16 bits"):
        export(packed_plan(model, [3], bits=8), model=model, output=tmp_path / "no")


def test_the_manifest_says_how_far_every_layer_is_from_what_it_was(model: Path, tmp_path: Path) -> None:
    manifest = export(packed_plan(model, [2, 1], bits=[4, 8, 16], head_bits=8), model=model, output=tmp_path / "out")
    assert manifest.packing is not None
    assert manifest.packing.method == "nearest"
    said = {(u.kind, u.index): (u.scheme, u.num_matrices) for u in manifest.packing.units}
    assert said == {("layer", 0): ("int4 g32", 7), ("layer", 1): ("int8 g32", 7), ("head", 0): ("int8 g32", 1)}
    weights, original = dequantised(tmp_path / "out", dtype="float64"), dequantised(model)
    for unit in manifest.packing.units:
        prefix = f"model.layers.{unit.index}." if unit.kind == "layer" else "lm_head"
        error = squared = 0.0
        for name, weight in original.items():
            if name.startswith(prefix):
                error += float(((weights[name].double() - weight.double()) ** 2).sum())
                squared += float((weight.double() ** 2).sum()) if weight.dim() == 2 else 0.0
        assert math.isclose(unit.relative_squared_error, error / squared, rel_tol=1e-5)
    assert open_export(tmp_path / "out").manifest == manifest


def test_a_manifest_of_weights_as_they_were_says_nothing_of_packing(model: Path, tmp_path: Path) -> None:
    manifest = export(make_plan(model, [3]), model=model, output=tmp_path / "out")
    assert "packing" not in json.loads(manifest.to_json())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_verify_rounds_the_models_weights_again_and_compares_every_byte(model: Path, tmp_path: Path) -> None:
    export(packed_plan(model, [2, 1], bits=4), model=model, output=tmp_path / "out")
    assert verify(tmp_path / "out", model=model).method == "nearest"
    other = shutil.copytree(model, tmp_path / "other")
    edit_tensor(other, "model.layers.2.mlp.down_proj.weight", place=1000, change=0.5)
    with pytest.raises(IntegrityError, match=r"layers\.2\.mlp\.down_proj\.weight_packed is not what"):
        verify(tmp_path / "out", model=other)


def test_a_stage_file_with_other_schemes_than_the_plan_chose_is_refused(model: Path, tmp_path: Path) -> None:
    for bits in (4, 8):
        export(packed_plan(model, [3], bits=bits), model=model, output=tmp_path / str(bits))
    (file,) = (tmp_path / "8").glob("*.safetensors")
    plan, manifest = open_export(tmp_path / "4").plan, open_export(tmp_path / "4").manifest
    from plans.export.tensors import check_tensors

    with pytest.raises(IntegrityError, match="is not what int4 makes of that module"):
        check_tensors(file, read_header(file), index=0, manifest=manifest, plan=plan)


def test_bytes_in_the_plan_are_those_of_the_packed_weights_or_it_is_refused(model: Path, tmp_path: Path) -> None:
    plan = packed_plan(model, [3], bits=4)
    as_stored = make_plan(model, [3]).model_copy(update={"weights": plan.weights})
    with pytest.raises(LlamaplanError, match="/units/layer0/weight_bytes"):
        export(as_stored, model=model, output=tmp_path / "out")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_cannot_be_rounded_is_refused_by_name_and_nothing_is_left(
    model: Path, tmp_path: Path, value: float
) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    edit_tensor(broken, "model.layers.1.self_attn.o_proj.weight", place=5, change=value)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.o_proj\.weight: holds NaN or infinite") as refused:
        export(packed_plan(broken, [3]), model=broken, output=tmp_path / "out")
    assert refused.value.code == "E-VALUES"
    assert names(tmp_path) == ["broken"]


def test_a_plan_that_wants_experts_of_several_widths_is_not_exported(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=96, num_local_experts=4, dtype="bfloat16",
    )  # fmt: skip
    MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    plan = packed_plan(tmp_path / "model", [3], bits=[4, 8, 8])
    with pytest.raises(
        UsageError, match=r"mixed weights, and transformers reads the experts of all layers in one width"
    ):
        export(plan, model=tmp_path / "model", output=tmp_path / "out")
    assert names(tmp_path) == ["model"]


def test_a_packed_export_is_no_model_to_be_packed_again(model: Path, tmp_path: Path) -> None:
    plan = packed_plan(model, [3])
    export(plan, model=model, output=tmp_path / "out")
    with pytest.raises(LlamaplanError):
        export(plan, model=tmp_path / "out", output=tmp_path / "again")


def test_killed_while_it_packs_the_target_is_absent_or_complete_and_a_rerun_gives_the_same_bytes(
    model: Path, tmp_path: Path
) -> None:
    plan = packed_plan(model, [1, 1, 1], bits=4)
    export(plan, model=model, output=tmp_path / "whole")
    total = count_calls(lambda: export(plan, model=model, output=tmp_path / "count"))
    for at in range(2, total + 1, total // 8):
        folder = tmp_path / f"at{at}"
        folder.mkdir()

        def run(folder: Path = folder, at: int = at) -> None:
            with watched(Counter(lambda: os.kill(os.getpid(), signal.SIGKILL), at=at)):
                export(plan, model=model, output=folder / "out")

        assert os.WIFSIGNALED(in_child(run)), at
        export(plan, model=model, output=folder / "out", force=True)
        assert tree(folder / "out") == tree(tmp_path / "whole"), at
        assert names(folder) == ["out"], at
