"""What a GGUF file says of its model, as config.json of what it becomes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import make_llama

from exporter.foreign.gguf.config import shortest
from exporter.foreign.gguf.rope import llama3_table
from exporter.foreign.opening import open_origin
from plans.errors import InputError
from plans.gguf.header import read_gguf_header
from tests.gguf_files import config_for, write_gguf
from tests.gguf_models import all_of, write_model

GgufOf = Callable[[str], Path]


def config_of(path: Path) -> dict[str, Any]:
    return dict(open_origin(path).checkpoint.config.raw)


def test_the_shipped_checkpoint_comes_back(gguf_of: GgufOf, shipped: Path) -> None:
    from transformers import AutoConfig

    wanted, found = json.loads((shipped / "config.json").read_text()), config_of(gguf_of("BF16"))
    known = found.keys() & wanted.keys()
    assert {key: found[key] for key in known - {"pad_token_id"}} == {
        key: wanted[key] for key in known - {"pad_token_id"}
    }
    assert wanted.keys() - found.keys() <= {
        *("attention_dropout", "initializer_range", "pretraining_tp", "transformers_version", "use_cache"),
        *("rope_parameters", "pad_token_id"),
    }
    assert AutoConfig.for_model(**found).rope_parameters == wanted["rope_parameters"]


def test_transformers_reads_the_same_of_the_file(gguf_of: GgufOf, tmp_path: Path) -> None:
    from transformers import AutoConfig

    path = gguf_of("BF16")
    theirs = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    ours = AutoConfig.for_model(**config_of(path)).to_dict()
    own = {
        "architectures",
        "dtype",
        "_name_or_path",
        "_model_name_or_path",
        "rms_norm_eps",
        "pad_token_id",
        "unk_token_id",
    }
    assert {k: v for k, v in ours.items() if k not in own} == {
        k: v for k, v in theirs.items() if k in ours.keys() - own
    }
    assert ours["rms_norm_eps"] == pytest.approx(theirs["rms_norm_eps"])


def test_a_tied_head_and_biases_are_seen(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "m", tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    found = config_of(write_model(model, tmp_path / "a.gguf", kinds=all_of("F32")))
    assert (found["tie_word_embeddings"], found["attention_bias"], found["mlp_bias"]) == (True, True, True)
    assert found["dtype"] == "float32"


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64)])
def test_the_rope_scaling_of_llama_3_is_recognised(factor: float, head_dim: int) -> None:
    """By the frequencies that transformers computes with it."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    table = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(head_dim=head_dim, rope_theta=500000.0, rope_scaling=dict(table))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    factors = tuple((plain / scaled).tolist())
    assert llama3_table(factors, theta=500000.0, head_dim=head_dim) == table
    assert llama3_table(factors[:-1], theta=500000.0, head_dim=head_dim) is None
    assert llama3_table((*factors[:-1], 7.0), theta=500000.0, head_dim=head_dim) is None


REFUSED = {
    "an architecture": (lambda to: write_gguf(to, config_for("gemma2")), "is of architecture gemma2, which is planned"),
    "experts": (lambda to: write_gguf(to, config_for("mixtral")), "has 4 experts"),
    "a key": (
        lambda to: write_gguf(to, config_for("llama"), attention__clamp_kqv=2.0), r"llama\.attention\.clamp_kqv is 2"),
    "a rope scaling nobody published": (
        lambda to: write_gguf(to, config_for("llama"), more={"rope_freqs.weight": (8,)}), "is not the rope scaling"),
    "rotary positions in a part of a head": (
        lambda to: write_gguf(to, config_for("llama"), rope__dimension_count=8), "rope.dimension_count is 8"),
    "biases in odd places": (
        lambda to: write_gguf(to, config_for("qwen3"), more={"blk.0.attn_q.bias": (64,)}), "has biases in"),
    "a layer without its norm": (
        lambda to: write_gguf(to, config_for("qwen3"), leave_out="blk.1.ffn_norm.weight"),
        r"layers\.1\.post_attention_layernorm\.weight is missing"),
    "no epsilon": (
        lambda to: write_gguf(to, config_for("qwen3"), attention__layer_norm_rms_epsilon=None), "epsilon is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str, tmp_path: Path) -> None:
    write, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        open_origin(write(tmp_path / "a.gguf"), form="bf16")


def test_yarn_is_carried_over(shipped: Path, tmp_path: Path) -> None:
    path = write_model(
        shipped, tmp_path / "a.gguf", kinds=all_of("F16"), rope__scaling__type="yarn", rope__scaling__factor=4.0
    )
    assert config_of(path)["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}


def test_numbers_are_those_a_person_wrote(gguf_of: GgufOf) -> None:
    stored = read_gguf_header(gguf_of("F16")).metadata["llama.attention.layer_norm_rms_epsilon"]
    assert stored != 1e-5
    assert [shortest(number) for number in (stored, 10000.0, 500000.0, 0.1, 1e6)] == [1e-5, 1e4, 5e5, 0.1, 1e6]
