"""Families outside the allow-list: sized right from their headers, or refused by the key that is not understood.

Exact parameter counts stand where another program's count of the published weights was found (for Command-R7B that of
Aya Expanse 8B, which has its shape); the others are only held against the size their name or page gives. KV sizes
follow from the attention: the latent, or keys and values of every KV head.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from planner.model.profile import build_profile
from plans.checkpoint.folder import open_checkpoint
from plans.config.config import parse_config
from plans.config.families import CLASS_CONTEXTS, CLASS_DEFAULTS, TIED_BY_DEFAULT, WINDOW_RULES
from plans.dtypes import STORED_DTYPES
from plans.errors import InputError
from plans.memory import layer_kv_bytes
from plans.profile import ModelProfile
from tests.conftest import RunCommand
from tests.planner.cases import workload

pytestmark = pytest.mark.row("P2")
Shapes = dict[str, tuple[int, ...]]
TWO_NORMS = ("input_layernorm", "post_attention_layernorm")


def write_headers(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Path:
    """Write config.json and a safetensors file with a hole for the data."""
    folder.mkdir(parents=True, exist_ok=True)
    table, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = STORED_DTYPES[dtype].size_bytes * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(table).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"} | dict(config)))
    return folder


def mlp(hidden: int, inner: int, at: str = "mlp.") -> Shapes:
    return {f"{at}{n}_proj.weight": (inner, hidden) for n in ("gate", "up")} | {
        f"{at}down_proj.weight": (hidden, inner)
    }


def attention(config: Mapping[str, Any], *, bias: str = "", head_dim: int | None = None) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = head_dim or config.get("head_dim") or hidden // heads
    q, kv = heads * width, config["num_key_value_heads"] * width
    rows = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    found: Shapes = {f"self_attn.{n}_proj.weight": shape for n, shape in rows.items()}
    return found | {f"self_attn.{n}_proj.bias": rows[n][:1] for n in bias}


def latent(config: Mapping[str, Any]) -> Shapes:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    q = config["q_lora_rank"]
    query = (
        {"q_a_proj.weight": (q, hidden), "q_a_layernorm.weight": (q,), "q_b_proj.weight": (heads * (nope + rope), q)}
        if q
        else {"q_proj.weight": (heads * (nope + rope), hidden)}
    )
    rest = {
        "kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (nope + value), rank),
        "o_proj.weight": (hidden, heads * value),
    }
    return {f"self_attn.{n}": s for n, s in (query | rest).items()}


def experts(
    config: Mapping[str, Any], count: int, inner: int, *, gate: str = "mlp.gate", at: str = "mlp.experts"
) -> Shapes:
    found: Shapes = {f"{gate}.weight": (count, config["hidden_size"])}
    for index in range(count):
        found |= mlp(config["hidden_size"], inner, f"{at}.{index}.")
    return found


def norms(config: Mapping[str, Any], *names: str) -> Shapes:
    return {f"{name}.weight": (config["hidden_size"],) for name in names or TWO_NORMS}


def whole(config: Mapping[str, Any], layers: list[Shapes], *, tied: bool = False, more: Shapes | None = None) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    found: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)} | (more or {})
    for index, layer in enumerate(layers):
        found |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return found if tied else found | {"lm_head.weight": (vocab, hidden)}


def bf16(shapes: Shapes) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def base(
    model_type: str, hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type, "architectures": ["Model"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": inner, "vocab_size": vocab,
        "max_position_embeddings": 32768,
    } | more  # fmt: skip


MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
PATTERN_KINDS = ["sliding_attention", "full_attention"] * 12


def deepseek_v2_lite() -> tuple[dict[str, Any], Shapes]:
    config = base("deepseek_v2", 2048, 27, 16, 16, 10944, 102400, **MLA, q_lora_rank=None, n_routed_experts=64,
                  n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408,
                  first_k_dense_replace=1)  # fmt: skip
    dense = norms(config) | latent(config) | mlp(2048, 10944)
    routed = norms(config) | latent(config) | mlp(2048, 2816, "mlp.shared_experts.") | experts(config, 64, 1408)
    return config, whole(config, [dense] + [routed] * 26)


def moonlight() -> tuple[dict[str, Any], Shapes]:
    config = base("deepseek_v3", 2048, 27, 16, 16, 11264, 163840, **MLA, q_lora_rank=None, n_routed_experts=64,
                  n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408, first_k_dense_replace=1,
                  num_nextn_predict_layers=0)  # fmt: skip
    dense = norms(config) | latent(config) | mlp(2048, 11264)
    routed = norms(config) | latent(config) | mlp(2048, 2816, "mlp.shared_experts.") | experts(config, 64, 1408)
    return config, whole(config, [dense] + [routed | {"mlp.gate.e_score_correction_bias": (64,)}] * 26)


def gemma_3_1b() -> tuple[dict[str, Any], Shapes]:
    config = base(
        "gemma3_text", 1152, 26, 4, 1, 6912, 262144, head_dim=256, sliding_window=512, sliding_window_pattern=6
    )
    names = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    inner: Shapes = {"self_attn.q_norm.weight": (256,), "self_attn.k_norm.weight": (256,)}
    return config, whole(config, [norms(config, *names) | attention(config) | inner | mlp(1152, 6912)] * 26, tied=True)


def command_r() -> tuple[dict[str, Any], Shapes]:
    config = base("cohere", 8192, 40, 64, 64, 22528, 256000)
    layer = norms(config, "input_layernorm") | attention(config) | mlp(8192, 22528)
    return config, whole(config, [layer] * 40, tied=True)


def command_r7b() -> tuple[dict[str, Any], Shapes]:
    config = base("cohere2", 4096, 32, 32, 8, 14336, 256000, head_dim=128, sliding_window=4096, layer_switch=4)
    layer = norms(config, "input_layernorm") | attention(config) | mlp(4096, 14336)
    return config, whole(config, [layer] * 32, tied=True)


def qwen15_moe() -> tuple[dict[str, Any], Shapes]:
    config = base("qwen2_moe", 2048, 24, 16, 16, 5632, 151936, num_experts=60, num_experts_per_tok=4,
                  moe_intermediate_size=1408, shared_expert_intermediate_size=5632, decoder_sparse_step=1,
                  use_sliding_window=False, sliding_window=32768, max_window_layers=21)  # fmt: skip
    shared = mlp(2048, 5632, "mlp.shared_expert.") | {"mlp.shared_expert_gate.weight": (1, 2048)}
    layer = norms(config) | attention(config, bias="qkv") | shared | experts(config, 60, 1408)
    return config, whole(config, [layer] * 24)


def olmoe() -> tuple[dict[str, Any], Shapes]:
    config = base("olmoe", 2048, 16, 16, 16, 1024, 50304, num_experts=64, num_experts_per_tok=8, clip_qkv=None)
    inner: Shapes = {"self_attn.q_norm.weight": (2048,), "self_attn.k_norm.weight": (2048,)}
    return config, whole(config, [norms(config) | attention(config) | inner | experts(config, 64, 1024)] * 16)


def starcoder2_3b() -> tuple[dict[str, Any], Shapes]:
    config = base("starcoder2", 3072, 30, 24, 2, 12288, 49152, sliding_window=4096, use_bias=True)
    fc: Shapes = {"mlp.c_fc.weight": (12288, 3072), "mlp.c_fc.bias": (12288,),
                  "mlp.c_proj.weight": (3072, 12288), "mlp.c_proj.bias": (3072,)}  # fmt: skip
    biases: Shapes = {f"{name}.bias": (3072,) for name in TWO_NORMS}
    layer = norms(config) | biases | attention(config, bias="qkvo") | fc
    return config, whole(config, [layer] * 30, tied=True, more={"model.norm.bias": (3072,)})


def glm_4_9b() -> tuple[dict[str, Any], Shapes]:
    config = base("glm", 4096, 40, 32, 2, 13696, 151552, head_dim=128, attention_bias=True)
    fused: Shapes = {"mlp.gate_up_proj.weight": (2 * 13696, 4096), "mlp.down_proj.weight": (4096, 13696)}
    return config, whole(config, [norms(config) | attention(config, bias="qkv") | fused] * 40)


def granite_4_micro() -> tuple[dict[str, Any], Shapes]:
    config = base("granitemoehybrid", 2560, 40, 40, 8, 8192, 100352, layer_types=["attention"] * 40,
                  num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=8192, tie_word_embeddings=True,
                  position_embedding_type="rope", mamba_n_heads=128, mamba_d_state=256, mamba_expand=2)  # fmt: skip
    fused: Shapes = {
        "shared_mlp.input_linear.weight": (2 * 8192, 2560),
        "shared_mlp.output_linear.weight": (2560, 8192),
    }
    return config, whole(config, [norms(config) | attention(config) | fused] * 40, tied=True)


PUBLISHED: dict[str, tuple[Any, int | None, float, int]] = {
    # name: (made by, parameters counted by others, size as published, KV bytes per token over all layers in bf16)
    "DeepSeek-V2-Lite": (deepseek_v2_lite, 15_706_484_224, 15.7e9, 27 * 576 * 2),
    "Moonlight-16B-A3B": (moonlight, None, 16e9, 27 * 576 * 2),
    "gemma-3-1b": (gemma_3_1b, 999_885_952, 1e9, 26 * 2 * 256 * 2),
    "c4ai-command-r-v01": (command_r, None, 35e9, 40 * 2 * 8192 * 2),
    "c4ai-command-r7b-12-2024": (command_r7b, 8_028_033_024, 8.03e9, 32 * 2 * 1024 * 2),
    "Qwen1.5-MoE-A2.7B": (qwen15_moe, 14_315_784_192, 14.3e9, 24 * 2 * 2048 * 2),
    "OLMoE-1B-7B": (olmoe, 6_919_161_856, 6.92e9, 16 * 2 * 2048 * 2),
    "starcoder2-3b": (starcoder2_3b, None, 3e9, 30 * 2 * 256 * 2),
    "granite-4.0-micro": (granite_4_micro, None, 3.4e9, 40 * 2 * 512 * 2),
    "glm-4-9b-hf": (glm_4_9b, 9_399_951_360, 9.4e9, 40 * 2 * 256 * 2),
}


def profile_of(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> ModelProfile:
    return build_profile(open_checkpoint(write_headers(folder, config, bf16(shapes))))


def kv_bytes(profile: ModelProfile, context: int) -> int:
    load = workload(context_tokens=context)
    return sum(layer_kv_bytes(layer, load) for layer in profile.layers)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters_and_their_cache(name: str, tmp_path: Path) -> None:
    make, exact, published, kv = PUBLISHED[name]
    profile = profile_of(tmp_path, *make())
    assert exact is None or profile.total_parameters == exact
    assert profile.total_parameters == pytest.approx(published, rel=0.02)
    assert sum(layer.kv_bytes_per_token for layer in profile.layers) == kv
    assert any(origin.number == "kv_bytes_per_token" for origin in profile.origins)


def test_a_latent_cache_is_counted_compressed_and_says_so(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, *deepseek_v2_lite())
    (origin,) = (o for o in profile.origins if o.key == "kv_lora_rank")
    assert "compressed latent" in origin.how
    read = sum(unit.decode_read_bytes for unit in profile.units)
    assert read == pytest.approx(4.9e9, rel=0.02)  # 6 of 64 experts and the shared ones
    assert ModelProfile.from_json(profile.to_json().encode(), where="x") == profile


def test_a_latent_cache_may_be_given_by_the_class_alone(tmp_path: Path) -> None:
    latents = {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
    config = base("minicpm3", 2560, 2, 40, 40, 6400, 73448, q_lora_rank=768, **latents)
    shapes = whole(config, [norms(config) | latent(config) | mlp(2560, 6400)] * 2)
    said = profile_of(tmp_path / "said", config, shapes)
    unsaid = profile_of(tmp_path / "unsaid", {k: v for k, v in config.items() if k not in latents}, shapes)
    assert unsaid.units == said.units
    assert said.layers[0].kv_bytes_per_token == 2 * (256 + 32)


def test_every_sixth_layer_keeps_everything(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, *gemma_3_1b())
    assert [i for i, layer in enumerate(profile.layers) if layer.kv_window_tokens is None] == [5, 11, 17, 23]
    assert kv_bytes(profile, 32768) == 2 * 256 * 2 * (4 * 32768 + 22 * 512)


def small(model_type: str, **more: Any) -> dict[str, Any]:
    return base(model_type, 64, 4, 4, 2, 96, 128) | more


def layer_of(config: Mapping[str, Any]) -> Shapes:
    return norms(config) | attention(config) | mlp(64, 96)


def test_packed_experts_count_what_they_stand_for(tmp_path: Path) -> None:
    config = small("gpt_oss", num_local_experts=8, num_experts_per_tok=2, experts_per_token=2, sliding_window=128,
                   head_dim=16, quantization_config={"quant_method": "mxfp4"})  # fmt: skip
    plain = bf16(whole(config, [norms(config) | attention(config) | {"self_attn.sinks": (4,)}] * 4))
    for layer in range(4):
        at = f"model.layers.{layer}.mlp."
        plain |= {f"{at}router.weight": ("BF16", (8, 64)), f"{at}experts.gate_up_proj_bias": ("BF16", (8, 192)),
                  f"{at}experts.gate_up_proj_blocks": ("U8", (8, 192, 2, 16)),
                  f"{at}experts.gate_up_proj_scales": ("U8", (8, 192, 2))}  # fmt: skip
    profile = build_profile(open_checkpoint(write_headers(tmp_path, config, plain)))
    layer = profile.layers[0]
    rest = 2 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 4 + 8 * 64
    assert layer.parameters == rest + 8 * 192 * 64 + 8 * 192
    expert = 192 * 32 + 192 * 2 + 192 * 2  # packed values, scales, biases
    assert layer.weight_bytes == 2 * rest + 8 * expert
    assert layer.decode_read_bytes == 2 * rest + 2 * expert
    assert [unit.kv_window_tokens for unit in profile.layers] == [128, None, 128, None]


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    config = small("glm4_moe", n_routed_experts=0, num_nextn_predict_layers=1)
    profile = profile_of(tmp_path, config, whole(config, [layer_of(config)] * 5))
    assert len(profile.layers) == 4
    assert {d.note.split(";")[0] for d in profile.differences} == {"belongs to no unit"}
    assert any(origin.key == "num_nextn_predict_layers" for origin in profile.origins)


def test_experts_of_zero_are_a_dense_model() -> None:
    for family in ("llama", "granite", "qwen3_moe"):
        assert parse_config(small(family, num_local_experts=0), where="x").num_experts == 0


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"])
@pytest.mark.parametrize("together", [False, True])
def test_experts_are_found_under_every_name(key: str, together: bool, tmp_path: Path) -> None:
    config = small("exotic_moe", **{key: 8}, num_experts_per_tok=2)
    one = {"mlp.experts.gate_up_proj": (8, 64, 192), "mlp.experts.down_proj": (8, 96, 64)}
    routed: Shapes = one if together else experts(config, 8, 96)
    layer = profile_of(tmp_path, config, whole(config, [norms(config) | attention(config) | routed] * 4)).layers[0]
    assert layer.weight_bytes - layer.decode_read_bytes == 6 * 3 * 64 * 96 * 2


def test_a_layer_without_attention_keeps_nothing(tmp_path: Path) -> None:
    ffn = {"ffn_mult": 2.25, "no_op": False}
    blocks = [{"attention": {"n_heads_in_group": 2, "no_op": i == 1}, "ffn": ffn} for i in range(4)]
    config = small("nemotron-nas", block_configs=blocks, num_key_value_heads=None, intermediate_size=None)
    with_heads = config | {"num_key_value_heads": 2}
    without = norms(config, "post_attention_layernorm") | mlp(64, 96)
    layers = [without if i == 1 else layer_of(with_heads) for i in range(4)]
    profile = profile_of(tmp_path, config, whole(config, layers))
    assert [layer.kv_bytes_per_token for layer in profile.layers] == [128, 0, 128, 128]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
        ({"index_topk": 2048}, "index_topk"),
        ({"full_attention_interval": 4}, "full_attention_interval"),
        ({"hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern"),
        ({"attn_layer_period": 8}, "attn_layer_period"),
        ({"multi_query": True}, "multi_query"),
        ({"attn_config": {"kv_n_heads": 1}}, "attn_config"),
        ({"linear_attn_config": {"kda_layers": [1]}}, "linear_attn_config"),
        ({"swa_num_key_value_heads": 8}, "swa_num_key_value_heads"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types/0"),
        ({"model_type": "granitemoehybrid", "layer_types": ["attention"] * 3 + ["rwkv"]}, "layer_types/3"),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba"] * 5}, "layer_types"),
        ({"model_type": "granitemoehybrid", "mamba_d_head": 5}, "mamba_n_heads"),
        ({"model_type": "granitemoehybrid", "mamba_d_state": 0}, "mamba_d_state"),
        ({"model_type": "bamba", "attn_layer_indices": "all"}, "attn_layer_indices"),
        ({"model_type": "qwen3_next", "sliding_window": 512}, "sliding_window"),
        ({"mamba_n_heads": 8}, "mamba_n_heads"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"model_type": "minimax_m2", "attn_type_list": [0, 1, 1, 1]}, "attn_type_list"),
        ({"attn_type_list": [1, 1, 1, 1]}, "attn_type_list"),
        ({"sliding_window": 512}, "sliding_window"),
        ({"attention_chunk_size": 512}, "attention_chunk_size"),
        ({"sliding_window": 512, "sliding_window_pattern": "LLLG"}, "sliding_window_pattern"),
        ({"n_routed_experts": 8}, "num_experts_per_tok"),
        ({"n_routed_experts": 8, "num_experts": 4, "moe_k": 2}, "n_routed_experts"),
        ({"kv_lora_rank": 512}, "qk_nope_head_dim"),
        ({"block_configs": [{"attention": {"window_length": 9}, "ffn": {"no_op": True}}] * 4}, "window_length"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused_by_its_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=f"/{key}: |/{key}:"):
        parse_config(small("exotic") | changes, where="config.json")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"mamba.in_proj.weight": (8, 64)}, "mamba.in_proj"),
        ({"self_attn.indexer.wk.weight": (8, 64)}, "indexer"),
        ({"self_attn.k_proj.weight": (64, 64)}, "k_proj gives 64 numbers per token, config.json says 32"),
        ({"mlp.experts.0.up_proj.weight": (8, 64)}, "tensors of 1 experts, config.json says 0"),
        ({"mlp.moe_expert_0.up_proj.weight": (8, 64)}, r"mlp\.moe_expert_0.* seems to belong to experts"),
        ({"mlp.k_proj.weight": (32, 64)}, r"holds mlp\.k_proj"),
    ],
    ids=str,
)
def test_headers_that_do_not_prove_the_size_are_refused(extra: Shapes, message: str, tmp_path: Path) -> None:
    config = small("exotic")
    with pytest.raises(InputError, match=message):
        profile_of(tmp_path, config, whole(config, [layer_of(config) | extra] * 4))


@pytest.mark.parametrize("value", [{}, {"max_position_embeddings": None}], ids=["absent", "null"])
@pytest.mark.parametrize(
    ("family", "tokens", "why"),
    [("exotic", 2048, "the class of exotic is not known"), ("glm4", 131072, "the class of glm4 assumes it")],
)
def test_a_context_that_config_json_does_not_state_is_said_to_be_assumed(
    family: str, tokens: int, why: str, value: dict[str, Any], run_command: RunCommand, tmp_path: Path
) -> None:
    config = {k: v for k, v in small(family, head_dim=16).items() if k != "max_position_embeddings"} | value
    folder = write_headers(tmp_path, config, bf16(whole(config, [layer_of(config)] * 4)))
    said = f"warning: max_position_embeddings is not in config.json; {tokens} tokens are assumed: {why}"
    for arguments in (("analyze", folder), ("solve", folder, "--device", "cpu=1GiB")):
        assert said in run_command("llamaplan", *arguments).err
    assert build_profile(open_checkpoint(folder)).model.max_position_embeddings == tokens


HYBRID = {"mamba_n_heads": 4, "mamba_d_state": 8, "num_local_experts": 0, "num_experts_per_tok": 0}


def hybrid(folder: Path, **changes: tuple[int, ...]) -> Path:
    """A Granite 4 of two mamba layers and two of attention, with a limit as transformers 4 writes it."""
    kinds = ["mamba", "attention"] * 2
    config = small("granitemoehybrid", layer_types=kinds, time_step_limit="LIMIT", **HYBRID)
    mamba: Shapes = {"mamba.conv1d.weight": (144, 1, 4), "mamba.A_log": (4,), "mamba.in_proj.weight": (276, 64)}
    mamba |= {name.replace("_of_", "."): shape for name, shape in changes.items()}
    layers = [norms(config) | mlp(64, 96) | (mamba if kind == "mamba" else attention(config)) for kind in kinds]
    write_headers(folder, config, bf16(whole(config, layers)))
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"LIMIT"', "[0.0, Infinity]"))
    return folder


def test_a_recurrent_state_counts_per_sequence_and_attention_per_token(tmp_path: Path) -> None:
    mamba, attends, *_ = build_profile(open_checkpoint(hybrid(tmp_path))).layers
    state = 144 * 4 * 2 + 128 * 8 * 4  # the inputs of x, B and C in bf16, and 128 channels x 8 in fp32
    assert (mamba.state_bytes_per_sequence, mamba.kv_bytes_per_token) == (state, 0)
    assert (attends.state_bytes_per_sequence, attends.kv_bytes_per_token) == (0, 128)
    for context in (256, 4096):
        work = workload(context_tokens=context, batch_size=3, requests_in_flight=2)
        assert layer_kv_bytes(mamba, work) == state * 6
        assert layer_kv_bytes(attends, work) == 128 * context * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mamba_of_conv1d.weight": (128, 1, 4)}, r"conv1d.weight has shape \[128, 1, 4\], config.json implies \[144"),
        ({"mamba_of_A_log": (8,)}, r"A_log has shape \[8\]"),
        ({"self_attn_of_k_proj.weight": (32, 64)}, "holds attention, config.json says it has none"),
        ({"rwkv_of_weight": (8, 8)}, "holds rwkv.weight"),
    ],
    ids=str,
)
def test_a_state_that_the_headers_do_not_prove_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        build_profile(open_checkpoint(hybrid(tmp_path, **changes)))


def test_a_hybrid_model_is_planned_checked_and_exported(run_command: RunCommand, tmp_path: Path) -> None:
    folder, plan, shards = hybrid(tmp_path / "model"), tmp_path / "plan.json", tmp_path / "shards"
    run_command("llamaplan", "solve", folder, "--device", "cpu=1GiB", "-c", "512", "--batch-size", "3", "-o", plan)
    (stage,) = json.loads(plan.read_text())["stages"]
    assert stage["kv_cache_bytes"] == 3 * 2 * (128 * 512 + 144 * 4 * 2 + 128 * 8 * 4)
    run_command("llamaplan", "check", plan, "--model", folder)
    page = tmp_path / "report.html"
    run_command("llamaplan", "report", plan, "-o", page)
    assert "and 5248 bytes of state in 2 layers" in page.read_text()
    run_command("llamaplan", "export", plan, "--model", folder, "-o", shards)
    run_command("llamaplan", "verify", shards, "--model", folder)
    config = folder / "config.json"  # the same tensors, read as two groups of half as many states
    config.write_text(config.read_text().replace('"mamba_d_state": 8', '"mamba_d_state": 4, "mamba_n_groups": 2'))
    refused = run_command("llamaplan", "export", plan, "--model", folder, "-o", tmp_path / "other")
    assert refused.code == 5
    assert "state_bytes_per_sequence: the plan says 5248, the checkpoint gives 3200" in refused.err


@pytest.mark.row("L5")
@pytest.mark.parametrize("text", ['{"rope_theta": Infinity}', '{"time_step_limit": [Infinity, Infinity]}'])
def test_infinity_is_read_nowhere_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="Infinity"):
        open_checkpoint(tmp_path)


def test_a_stack_of_matrices_that_is_not_one_for_each_expert_is_refused(tmp_path: Path) -> None:
    config = small("exotic", num_experts=8, num_experts_per_tok=2)
    stacks: Shapes = {"mlp.experts.down_proj": (8, 96, 64), "mlp.w13": (64, 8, 192)}
    with pytest.raises(InputError, match=r"mlp\.w13 of shape \[64, 8, 192\], which seems to belong to experts"):
        profile_of(tmp_path, config, whole(config, [norms(config) | attention(config) | stacks] * 4))


# --- class defaults against transformers itself ------------------------------------------------------------------


@pytest.mark.row("P4")
def test_ties_by_default_are_those_of_the_classes() -> None:
    from transformers import CONFIG_MAPPING

    for family in sorted(TIED_BY_DEFAULT & set(CONFIG_MAPPING)):
        assert CONFIG_MAPPING[family]().tie_word_embeddings is True, family
    for family in sorted(set(CLASS_DEFAULTS) - TIED_BY_DEFAULT):
        assert CONFIG_MAPPING[family]().tie_word_embeddings is False, family
    assert parse_config(small("cohere"), where="x").tie_word_embeddings
    assert not parse_config(small("cohere", tie_word_embeddings=False), where="x").tie_word_embeddings


@pytest.mark.parametrize("family", sorted(CLASS_CONTEXTS))
def test_contexts_by_default_are_those_of_the_classes(family: str) -> None:
    from transformers import CONFIG_MAPPING

    assert CLASS_CONTEXTS[family] == CONFIG_MAPPING[family]().max_position_embeddings
    assert CLASS_CONTEXTS.keys() >= CLASS_DEFAULTS.keys()


@pytest.mark.parametrize("family", sorted(WINDOW_RULES))
def test_windows_by_default_are_those_of_the_classes(family: str) -> None:
    from transformers import AutoConfig

    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 12, "num_key_value_heads": 4,
             "intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 131072}  # fmt: skip
    live = AutoConfig.for_model(family, **shape)
    ours = parse_config({"model_type": family} | shape, where="x").sliding_windows
    kinds = getattr(live, "layer_types", None) or ["sliding_attention"] * 12
    sizes = {
        "full_attention": None,
        "sliding_attention": getattr(live, "sliding_window", None),
        "chunked_attention": getattr(live, "attention_chunk_size", None),
    }
    assert ours == tuple(sizes[kind] for kind in kinds)
