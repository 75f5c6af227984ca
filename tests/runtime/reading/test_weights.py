"""A stage gets exactly its tensors: nothing missing, nothing unknown, nothing copied without need."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from parity import CPU, as_stage, reference_model, some_cut
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig, MixtralConfig, PreTrainedConfig

from plans.checkpoint.folder import open_checkpoint
from plans.errors import InputError
from plans.stages import StageRange
from runtime import load
from runtime.reading.families import build_skeleton, family_class, parse_model_config
from runtime.reading.tensors import FolderTensors
from runtime.stages.stage import Stage, build_stage

MIDDLE = StageRange("cpu", 1, 3, has_embedding=False, has_head=False)
LAST = StageRange("cpu", 3, 4, has_embedding=False, has_head=True)


class Watched(Mapping[str, torch.Tensor]):
    """Tensors that remember which of them were read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors, self.read = tensors, set[str]()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors


def build(
    folder: Path, spec: StageRange, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype = torch.float32
) -> Stage:
    config = parse_model_config(open_checkpoint(folder).config.raw)
    return build_stage(config, spec, tensors, dtype=dtype, device=CPU)


def read_by(spec: StageRange, folder: Path) -> set[str]:
    """The tensors that building a stage reads."""
    tensors = Watched(load_file(folder / "model.safetensors"))
    build(folder, spec, tensors)
    return tensors.read


def test_a_stage_reads_only_its_own_tensors(tiny: Path) -> None:
    tensors = Watched(load_file(tiny / "model.safetensors"))
    stage = build(tiny, MIDDLE, tensors)
    assert tensors.read == {name for name in tensors if name.startswith(("model.layers.1.", "model.layers.2."))}
    assert sum(p.numel() for p in stage.parameters()) == sum(tensors.tensors[name].numel() for name in tensors.read)


def test_a_stage_loads_from_its_bundle_alone(tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    own = {name: tensors[name] for name in read_by(LAST, tiny)}
    states = torch.randn(1, 3, 36)
    assert torch.equal(build(tiny, LAST, own)(states), build(tiny, LAST, tensors)(states))


def test_tensors_of_the_stored_dtype_stay_mapped(shipped: Path) -> None:
    checkpoint = open_checkpoint(shipped)
    tensors = FolderTensors(checkpoint)
    stage = build(shipped, as_stage(0, 9, num_layers=7), tensors, dtype=torch.bfloat16)
    spans = _mapped_spans(".safetensors")
    for name, parameter in stage.model.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in spans), name


def _mapped_spans(suffix: str) -> list[tuple[int, int]]:
    rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(suffix)]
    return [tuple(int(edge, 16) for edge in row[0].split("-")) for row in rows]  # type: ignore[misc]


def test_missing_tensors_are_named(tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(InputError, match=r"1 tensor missing for layers 1-2: model\.layers\.2\.mlp\.up_proj\.weight"):
        build(tiny, MIDDLE, tensors)
    build(tiny, LAST, tensors)


def test_unknown_tensors_are_named_and_never_dropped(tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    with pytest.raises(InputError, match=r"1 tensor the model has no place for: model\.layers\.1\.mlp\.extra\.weight"):
        build(tiny, MIDDLE, tensors | {"model.layers.1.mlp.extra.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"no part of the model uses: vision\.weight"):
        build(tiny, MIDDLE, tensors | {"vision.weight": torch.zeros(1)})


def test_stored_rotary_tables_are_ignored_and_rebuilt(tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    old = tensors | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(5) for i in range(4)}
    states = torch.randn(1, 3, 36)
    assert torch.equal(build(tiny, MIDDLE, old)(states), build(tiny, MIDDLE, tensors)(states))


def test_rotary_frequencies_stay_fp32_in_a_bf16_stage(tiny: Path) -> None:
    stage = build(tiny, MIDDLE, load_file(tiny / "model.safetensors"), dtype=torch.bfloat16)
    rotary = stage.model.base_model.rotary_emb
    reference = reference_model(tiny, dtype=torch.bfloat16).model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, reference.inv_freq)


def test_a_wrong_shape_names_both_shapes(tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(56, 35)
    with pytest.raises(InputError, match=r"up_proj\.weight has shape \[56, 35\], config\.json says \[56, 36\]"):
        build(tiny, MIDDLE, tensors)


def test_integer_and_eight_bit_weights_are_refused(tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        changed = tensors | {"model.layers.1.mlp.up_proj.weight": torch.zeros(56, 36).to(dtype)}
        with pytest.raises(InputError, match=rf"up_proj\.weight is stored as {dtype}"):
            build(tiny, MIDDLE, changed)


def tied_config(**changes: object) -> LlamaConfig:
    return LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 64,
            "tie_word_embeddings": True,
        }
        | changes
    )


def test_a_tied_head_alone_loads_the_embedding_table(make_checkpoint: Callable[[PreTrainedConfig], Path]) -> None:
    folder = make_checkpoint(tied_config())
    tensors = Watched(load_file(folder / "model.safetensors"))
    assert "lm_head.weight" not in tensors
    stage = build(folder, StageRange("cpu", 2, 2, has_embedding=False, has_head=True), tensors)
    assert tensors.read == {"model.embed_tokens.weight", "model.norm.weight"}
    assert torch.equal(stage.model.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_a_tied_table_written_twice_is_shared_again_and_a_different_head_is_kept(
    make_checkpoint: Callable[[PreTrainedConfig], Path],
) -> None:
    folder = make_checkpoint(tied_config())
    tensors = load_file(folder / "model.safetensors")
    whole = StageRange("cpu", 0, 2, has_embedding=True, has_head=True)
    table = tensors["model.embed_tokens.weight"]
    twice = build(folder, whole, tensors | {"lm_head.weight": table.clone()})
    assert twice.model.lm_head.weight is twice.model.model.embed_tokens.weight
    other = build(folder, whole, tensors | {"lm_head.weight": table + 1})
    assert torch.equal(other.model.lm_head.weight, table + 1)
    assert torch.equal(other.model.model.embed_tokens.weight, table)


def test_mixtral_experts_are_stacked_whether_stored_apart_or_together(
    make_checkpoint: Callable[[PreTrainedConfig], Path],
) -> None:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    folder = make_checkpoint(config)
    apart = load_file(folder / "model.safetensors")
    assert "model.layers.1.block_sparse_moe.experts.2.w3.weight" in apart
    chain = load(folder)
    together = {name: p.detach() for name, p in chain.named_parameters()}
    spec = StageRange("cpu", 1, 2, has_embedding=False, has_head=True)
    states = torch.randn(2, 5, 32)
    assert torch.equal(build(folder, spec, apart)(states), build(folder, spec, together)(states))
    del apart["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    with pytest.raises(InputError, match="down_proj has shape"):
        build(folder, spec, apart)


def test_per_layer_settings_are_cut_with_the_layers() -> None:
    config = AutoConfig.for_model(
        "smollm3", hidden_size=16, intermediate_size=16, num_hidden_layers=8, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32, pad_token_id=0,
    )  # fmt: skip
    assert config.no_rope_layers == [1, 1, 1, 0, 1, 1, 1, 0]
    skeleton = build_skeleton(config, family_class("smollm3"))
    tensors = {name: torch.zeros(p.shape) for name, p in skeleton.named_parameters()}
    spec = StageRange("cpu", 2, 5, has_embedding=False, has_head=False)
    stage = build_stage(config, spec, tensors, dtype=torch.float32, device=CPU)
    assert stage.model.config.no_rope_layers == [1, 0, 1]
    assert stage.model.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in stage.model.model.layers] == [0, 1, 2]
    assert len(stage.new_cache().layers) == 3
    assert config.num_hidden_layers == 8


def test_the_whole_is_the_sum_of_its_stages(tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    names = [read_by(spec, tiny) for spec in some_cut(4, 3, seed=7)]
    assert frozenset().union(*names) == set(tensors)
    assert sum(map(len, names)) == len(tensors)
