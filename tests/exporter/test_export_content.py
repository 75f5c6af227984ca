"""What is in an export: the model's own bytes, cut at the stage boundaries, in a folder that transformers loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from export_helpers import make_plan, tensor_bytes, tree

from exporter import export, verify
from exporter.foreign.opening import open_origin
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.header import read_header
from plans.checkpoint.names import unit_of
from plans.errors import IntegrityError, UsageError
from plans.export.manifest import Manifest
from plans.export.opening import check_fast, open_export

CUTS = [[7], [3, 4], [0, 7], [7, 0], [2, 3, 2], [0, 7, 0], [1, 1, 1, 1, 1, 1, 1], [0, 1, 2, 4, 0]]


def logits(folder: Path, *, dtype: Any = "auto", shape: tuple[int, int] = (2, 6)) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.arange(3, 3 + shape[0] * shape[1]).reshape(shape)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_tensor_of_an_export_has_the_sources_bytes(shipped: Path, tmp_path: Path, cut: list[int]) -> None:
    plan = make_plan(shipped, cut)
    export(plan, model=shipped, output=tmp_path / "out")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(shipped)
    verified = verify(tmp_path / "out", model=shipped)
    assert verified.num_tensors_compared == len(tensor_bytes(shipped))
    assert not verified.warnings


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_each_stage_file_holds_its_units_and_nothing_else(shipped: Path, tmp_path: Path, cut: list[int]) -> None:
    plan = make_plan(shipped, cut)
    export(plan, model=shipped, output=tmp_path / "out")
    for index, stage in enumerate(plan.stages):
        header = read_header(tmp_path / "out" / f"model-{index + 1:05d}-of-{len(cut):05d}.safetensors")
        expected = {("layer", i) for i in range(stage.start_layer, stage.end_layer)}
        expected |= {("embedding", 0)} if stage.has_embedding else set()
        expected |= {("head", 0)} if stage.has_head else set()
        assert {unit_of(name) for name in header.tensors} == expected
        assert header.metadata["llamaplan_stage"] == str(index)
        assert all(entry.begin % 64 == 0 for entry in header.tensors.values())


@pytest.mark.parametrize("cut", [[7], [0, 7, 0], [2, 3, 2]], ids=str)
def test_transformers_loads_an_export_and_computes_the_same_logits(
    shipped: Path, tmp_path: Path, cut: list[int]
) -> None:
    export(make_plan(shipped, cut), model=shipped, output=tmp_path / "out")
    assert logits(tmp_path / "out").equal(logits(shipped))


@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 12, "shard": "30KB"},
        {"tie_word_embeddings": True, "dtype": "float32", "shard": "20KB"},
    ],
    ids=str,
)
@pytest.mark.parametrize("cut", [[5], [2, 3], [0, 5, 0]], ids=str)
def test_exports_of_random_llamas_give_the_same_logits(
    models: Callable[..., Path], tmp_path: Path, config: dict[str, Any], cut: list[int]
) -> None:
    model = models(**config)
    export(make_plan(model, cut), model=model, output=tmp_path / "out")
    assert logits(tmp_path / "out").equal(logits(model))
    assert verify(tmp_path / "out", model=model).num_tensors_compared


@pytest.mark.parametrize("spaces", range(0, 64, 8))
def test_fp32_logits_of_one_sequence_are_the_sources_wherever_its_data_starts(
    models: Callable[..., Path], tmp_path: Path, spaces: int
) -> None:
    # torch's matrix-vector kernels sum in another order when a mapped weight's address changes modulo 16
    model = models(dtype="float32", hidden_size=40, intermediate_size=56, num_attention_heads=5, num_key_value_heads=5)
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    data = (model / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end] + b" " * spaces
    (moved / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    export(make_plan(moved, [2, 3]), model=moved, output=tmp_path / "out")
    assert logits(tmp_path / "out", shape=(1, 1)).equal(logits(moved, shape=(1, 1)))
    for path in (tmp_path / "out").glob("*.safetensors"):
        starts = {entry.begin % 16 for entry in read_header(path).tensors.values()}
        assert starts == {(end + spaces) % 16}


def test_a_tied_head_cut_from_its_embedding_becomes_a_tensor_of_the_last_file(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    model = models(tie_word_embeddings=True)
    assert "lm_head.weight" not in tensor_bytes(model)
    export(make_plan(model, [2, 3]), model=model, output=tmp_path / "cut")
    found = tensor_bytes(tmp_path / "cut")
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]
    assert "lm_head.weight" in read_header(tmp_path / "cut" / "model-00002-of-00002.safetensors").tensors
    export(make_plan(model, [5]), model=model, output=tmp_path / "whole")
    assert "lm_head.weight" not in tensor_bytes(tmp_path / "whole")


def test_an_export_can_be_exported_again(shipped: Path, tmp_path: Path) -> None:
    export(make_plan(shipped, [3, 4]), model=shipped, output=tmp_path / "first")
    again = make_plan(tmp_path / "first", [2, 2, 3])
    export(again, model=tmp_path / "first", output=tmp_path / "second")
    assert tensor_bytes(tmp_path / "second") == tensor_bytes(shipped)
    assert not open_checkpoint(tmp_path / "second").warnings


def test_an_export_of_a_tied_model_can_be_exported_again(models: Callable[..., Path], tmp_path: Path) -> None:
    model = models(tie_word_embeddings=True)
    export(make_plan(model, [3, 2]), model=model, output=tmp_path / "first")
    export(make_plan(tmp_path / "first", [5]), model=tmp_path / "first", output=tmp_path / "second")
    assert logits(tmp_path / "second").equal(logits(model))


def test_small_files_are_copied_byte_for_byte_and_code_never(shipped: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(shipped, model)
    (model / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (model / "optimizer.pt").write_bytes(b"\x80\x04")
    warnings: list[str] = []
    export(make_plan(model, [3, 4]), model=model, output=tmp_path / "out", warn=warnings.append)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (shipped / name).read_bytes()
    assert not list((tmp_path / "out").glob("*.p*y*")) + list((tmp_path / "out").glob("*.pt"))
    assert any("never run" in text for text in warnings)


def test_the_index_lists_every_tensor_once_with_its_total_size(shipped: Path, tmp_path: Path) -> None:
    export(make_plan(shipped, [3, 4]), model=shipped, output=tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = tensor_bytes(shipped)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(map(len, tensors.values()))


def test_the_manifest_records_the_sources_as_sha256sum_sees_them(shipped: Path, tmp_path: Path) -> None:
    manifest = export(make_plan(shipped, [3, 4]), model=shipped, output=tmp_path / "out")
    found = tree(shipped)
    for source in manifest.source:
        assert source.sha256 == found[source.name]
        assert source.size == (shipped / source.name).stat().st_size
    assert {source.name for source in manifest.source} >= {"config.json", "model-00001-of-00004.safetensors"}
    written = tree(tmp_path / "out")
    assert {file.path: file.sha256 for file in manifest.files}.items() <= written.items()
    assert Manifest.read(tmp_path / "out" / "manifest.json") == manifest


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_dtype_is_converted_exactly_as_torch_does(shipped: Path, tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file

    export(make_plan(shipped, [3, 4]), model=shipped, output=tmp_path / "out", dtype=dtype)
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    source = {name: t for path in shipped.glob("*.safetensors") for name, t in load_file(path).items()}
    ours = {name: t for path in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(path).items()}
    assert ours.keys() == source.keys()
    assert all(ours[name].dtype == kind and ours[name].equal(source[name].to(kind)) for name in source)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**json.loads((shipped / "config.json").read_text()), "dtype": str(kind).removeprefix("torch.")}
    assert verify(tmp_path / "out", model=shipped).num_tensors_compared == len(source)
    assert logits(tmp_path / "out").equal(logits(shipped, dtype=kind))


def test_a_conversion_in_many_chunks_equals_one_in_a_single_chunk(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models(dtype="float32", attention_bias=True)
    plan = make_plan(model, [2, 3])
    whole = export(plan, model=model, output=tmp_path / "whole", dtype="bf16")
    monkeypatch.setattr("exporter.stream.BUFFER_BYTES", 1000)
    chunked = export(plan, model=model, output=tmp_path / "chunked", dtype="bf16")
    assert chunked == whole
    assert tree(tmp_path / "chunked") == tree(tmp_path / "whole")


def test_a_plan_solved_for_another_dtype_is_exported_in_it(shipped: Path, tmp_path: Path) -> None:
    plan = make_plan(shipped, [3, 4], dtype="fp32")
    assert export(plan, model=shipped, output=tmp_path / "out").dtype == "fp32"
    opened = open_export(tmp_path / "out")
    assert opened.config.dtype == "fp32"
    for index, bundle in opened.bundles.items():
        held = sum(entry.size_bytes for entry in bundle.header.tensors.values())
        assert held == plan.stages[index].weight_bytes


def test_a_dtype_the_plan_does_not_count_is_warned_about(shipped: Path, tmp_path: Path) -> None:
    warnings: list[str] = []
    export(make_plan(shipped, [7]), model=shipped, output=tmp_path / "out", dtype="fp32", warn=warnings.append)
    assert any("counts bf16" in text for text in warnings)


def test_an_unknown_dtype_is_refused(shipped: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int4"):
        export(make_plan(shipped, [7]), model=shipped, output=tmp_path / "out", dtype="int4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stages", [{0}, {1}, {2}, {0, 2}], ids=str)
def test_a_part_for_one_host_has_the_whole_exports_id_and_suffices(
    shipped: Path, shards: Path, tmp_path: Path, stages: set[int]
) -> None:
    plan = make_plan(shipped, [3, 2, 2])
    manifest = export(plan, model=shipped, output=tmp_path / "part", stages=stages)
    part, whole = tree(tmp_path / "part"), tree(shards)
    assert part.items() < whole.items()
    missing = set(whole) - set(part)
    names = {f"{kind}-{i + 1:05d}-of-00003.{end}" for i in {0, 1, 2} - stages for kind, end in KINDS}
    assert missing == names
    opened = open_export(tmp_path / "part", stage=stages, expect_id=manifest.export_id)
    for stage in stages:
        check_fast(opened, stage=stage)
    assert verify(tmp_path / "part", stage=stages, model=shipped).stages == tuple(sorted(stages))
    with pytest.raises(IntegrityError, match="missing"):
        open_export(tmp_path / "part")


KINDS = [("model", "safetensors"), ("stage", "json")]


def test_parts_copied_together_are_the_whole_export(shipped: Path, shards: Path, tmp_path: Path) -> None:
    import shutil

    plan = make_plan(shipped, [3, 2, 2])
    together = tmp_path / "together"
    for stage in range(3):
        export(plan, model=shipped, output=tmp_path / f"part{stage}", stages=[stage])
        shutil.copytree(tmp_path / f"part{stage}", together, dirs_exist_ok=True)
    assert tree(together) == tree(shards)


def test_a_stage_that_does_not_exist_is_refused(shipped: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no stage 3"):
        export(make_plan(shipped, [3, 2, 2]), model=shipped, output=tmp_path / "out", stages=[1, 3])
    assert not list(tmp_path.iterdir())


def test_values_too_large_for_fp16_become_infinite_and_are_named(models: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(models(dtype="float32"), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, :2] = 1e6
    tensors["model.layers.4.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    warnings: list[str] = []
    export(make_plan(model, [5]), model=model, output=tmp_path / "out", dtype="fp16", warn=warnings.append)
    (said,) = [text for text in warnings if "infinite" in text]
    assert said == "2 values of model.layers.3.mlp.up_proj.weight are too large for fp16 and became infinite"
    export(make_plan(model, [5]), model=model, output=tmp_path / "bf16", dtype="bf16", warn=warnings.append)
    assert len([text for text in warnings if "infinite" in text]) == 1


FAMILIES = {
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "gemma2": {"head_dim": 8, "sliding_window": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_exported_the_same_way(tmp_path: Path, family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        dtype="bfloat16",
        pad_token_id=0,
        **FAMILIES[family],
    )
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    export(make_plan(model, [1, 2]), model=model, output=tmp_path / "out")
    assert logits(tmp_path / "out").equal(logits(model))
    assert verify(tmp_path / "out", model=model).num_stages == 2


def test_quantised_weights_keep_their_bytes_and_are_never_converted(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    import torch
    from export_helpers import edit_json
    from safetensors.torch import load_file, save_file

    from exporter.emit import emit

    model = tmp_path / "model"
    shutil.copytree(models(dtype="float16"), model)
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, columns = tensors.pop(name).shape
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.qweight"] = torch.randint(-9, 9, (columns // 8, rows), dtype=torch.int32)
        tensors[f"{stem}.scales"] = torch.rand(1, rows).half()
        tensors[f"{stem}.qzeros"] = torch.randint(-9, 9, (1, rows // 8), dtype=torch.int32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    edit_json(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    plan = make_plan(model, [2, 3])
    manifest = export(plan, model=open_origin(model, form="as stored"), output=tmp_path / "out")
    assert manifest.dtype == "fp16"
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(model)
    assert verify(tmp_path / "out", model=model).num_tensors_compared == len(tensors)
    with pytest.raises(UsageError, match="quantised \\(gptq\\)"):
        export(plan, model=open_origin(model, form="as stored"), output=tmp_path / "no", dtype="bf16")
    with pytest.raises(UsageError, match="does not run gptq"):
        emit(plan, engine="torchrun")
    assert not any("gptq" in text for text in emit(plan, engine="vllm").not_expressed)
