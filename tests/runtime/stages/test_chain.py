"""A chain is used like the unsplit transformers model, and gives the same tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import reference_model, save_model, some_cut
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    TextIteratorStreamer,
    pipeline,
)

from plans.errors import InputError, UsageError
from plans.stages import StageRange, check_stages
from runtime import load
from runtime.stages.chain import Chain

PADDED = {
    "input_ids": torch.tensor([[0, 0, 0, 5, 9, 11, 5, 9, 12], [7, 8, 9, 10, 11, 7, 8, 9, 10]]),
    "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9]),
}
SINGLE = {"input_ids": PADDED["input_ids"][1:]}

MODES: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
    "greedy": (PADDED, {}),
    "sampling": (PADDED, {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95}),
    "min-p and repetition penalty": (PADDED, {"do_sample": True, "min_p": 0.02, "repetition_penalty": 1.3}),
    "several answers": (PADDED, {"do_sample": True, "num_return_sequences": 3}),
    "beams": (PADDED, {"num_beams": 4, "num_return_sequences": 2}),
    "sampled beams": (PADDED, {"num_beams": 3, "do_sample": True}),
    "static cache": (PADDED, {"cache_implementation": "static"}),
    "static cache, beams": (PADDED, {"cache_implementation": "static", "num_beams": 2}),
    "chunked prefill": (PADDED, {"prefill_chunk_size": 4}),
    "chunked prefill into a static cache": (PADDED, {"prefill_chunk_size": 4, "cache_implementation": "static"}),
    "no cache": (PADDED, {"use_cache": False}),
    "prompt lookup": (SINGLE, {"prompt_lookup_num_tokens": 3}),
    "prompt lookup, sampling": (SINGLE, {"prompt_lookup_num_tokens": 3, "do_sample": True}),
    "no repeated pairs": (PADDED, {"no_repeat_ngram_size": 2}),
}


@pytest.fixture(scope="module")
def pair(tiny: Path) -> tuple[Any, Chain]:
    """The unsplit model, and the same model as three stages (the embedding alone in the first)."""
    cut = (
        StageRange("cpu#0", 0, 0, has_embedding=True, has_head=False),
        StageRange("cpu#1", 0, 3, has_embedding=False, has_head=False),
        StageRange("cpu#2", 3, 4, has_embedding=False, has_head=True),
    )
    return reference_model(tiny, dtype=torch.float32), load(tiny, stages=cut)


def both(pair: tuple[Any, Any], call: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Run the same call on both models from the same random state."""
    results = []
    for model in pair:
        torch.manual_seed(3)
        with torch.no_grad():
            results.append(call(model))
    return results[0], results[1]


@pytest.mark.parametrize("mode", MODES)
def test_generate_gives_the_tokens_of_the_unsplit_model(mode: str, pair: tuple[Any, Chain]) -> None:
    inputs, options = MODES[mode]
    expected, found = both(pair, lambda model: model.generate(**inputs, **options, max_new_tokens=40))
    assert torch.equal(expected, found)


def test_assisted_decoding_gives_the_tokens_of_the_unsplit_model(
    pair: tuple[Any, Chain], tiny: Path, make_checkpoint: Callable[[PreTrainedConfig], Path], tiny_config: LlamaConfig
) -> None:
    smaller = LlamaConfig(**tiny_config.to_dict() | {"num_hidden_layers": 1})
    assistant = reference_model(make_checkpoint(smaller), dtype=torch.float32)
    for sampling in ({}, {"do_sample": True}):
        expected, found = both(
            pair, lambda m, s=sampling: m.generate(**SINGLE, **s, assistant_model=assistant, max_new_tokens=30)
        )
        assert torch.equal(expected, found)
    as_assistant = load(tiny, stages=some_cut(4, 2, seed=1))
    unsplit, chain = (pair[0].generate(**SINGLE, assistant_model=a, max_new_tokens=30) for a in (pair[0], as_assistant))
    assert torch.equal(unsplit, chain)


def test_logits_scores_and_attentions_are_those_of_the_unsplit_model(pair: tuple[Any, Chain]) -> None:
    options = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    expected, found = both(pair, lambda model: model.generate(**PADDED, **options, max_new_tokens=6))
    for name in ("logits", "hidden_states"):
        for step, other in zip(expected[name], found[name], strict=True):
            torch.testing.assert_close(step, other, rtol=0, atol=0)


def test_logits_to_keep_and_labels_are_respected(pair: tuple[Any, Chain]) -> None:
    expected, found = both(pair, lambda model: model(**PADDED, logits_to_keep=2, labels=None).logits)
    assert torch.equal(expected, found)
    assert found.shape[1] == 2
    expected, found = both(pair, lambda model: model(**PADDED, labels=PADDED["input_ids"]).loss)
    assert torch.equal(expected, found)


def test_eager_attention_can_be_chosen_and_returns_weights(tiny: Path) -> None:
    models = reference_model(tiny, dtype=torch.float32), load(tiny, stages=some_cut(4, 3, seed=2))
    for model in models:
        model.set_attn_implementation("eager")
    expected, found = both(models, lambda model: model(**PADDED, output_attentions=True))
    assert torch.equal(expected.logits, found.logits)
    assert all(torch.equal(a, b) for a, b in zip(expected.attentions, found.attentions, strict=True))


def test_a_users_own_cache_continues_a_conversation(pair: tuple[Any, Chain]) -> None:
    def two_turns(model: Any) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        first = model.generate(**SINGLE, past_key_values=cache, max_new_tokens=5, eos_token_id=None)
        more = torch.cat([first, torch.tensor([[20, 21, 22]])], dim=-1)
        return model.generate(more, past_key_values=cache, max_new_tokens=5, eos_token_id=None)

    expected, found = both(pair, two_turns)
    assert torch.equal(expected, found)


def test_every_layers_cache_has_one_entry_per_layer_of_the_whole_model(pair: tuple[Any, Chain]) -> None:
    output = pair[1](**PADDED, use_cache=True)
    assert len(output.past_key_values.layers) == 4
    assert {layer.keys.shape[2] for layer in output.past_key_values.layers} == {9}


def test_streamers_stop_strings_and_pipelines_work(shipped: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    models = reference_model(shipped, dtype=torch.bfloat16), load(shipped, stages=some_cut(7, 3, seed=12))
    inputs = tokenizer("def __init__(self", return_tensors="pt")
    inputs.pop("token_type_ids", None)

    def streamed(model: Any) -> str:
        streamer = TextIteratorStreamer(tokenizer)
        model.generate(**inputs, max_new_tokens=24, streamer=streamer, stop_strings=["self."], tokenizer=tokenizer)
        return "".join(streamer)

    expected, found = both(models, streamed)
    assert expected == found
    expected, found = both(
        models,
        lambda m: pipeline("text-generation", model=m, tokenizer=tokenizer)(
            "import ", max_new_tokens=8, do_sample=False
        ),
    )
    assert expected == found
    assert "not supported for text-generation" not in caplog.text


def test_a_chain_is_an_instance_of_the_checkpoints_own_class(pair: tuple[Any, Chain]) -> None:
    assert isinstance(pair[1], Chain)
    assert isinstance(pair[1], LlamaForCausalLM)
    assert list(pair[1].state_dict()) == list(pair[0].state_dict())


def test_a_saved_chain_is_the_checkpoint_again(pair: tuple[Any, Chain], tmp_path: Path) -> None:
    pair[1].save_pretrained(tmp_path)
    again = reference_model(tmp_path, dtype=torch.float32)
    assert torch.equal(again(**PADDED).logits, pair[0](**PADDED).logits)


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused(name: str, pair: tuple[Any, Chain]) -> None:
    with pytest.raises(UsageError, match="continuous batching does not work on a chain"):
        getattr(pair[1], name)([[5, 6, 7]])


def test_generate_with_a_paged_cache_is_refused_too(pair: tuple[Any, Chain]) -> None:
    with pytest.raises(UsageError, match="continuous batching"):
        pair[1].generate(**SINGLE, cache_implementation="paged", max_new_tokens=3)


def test_a_tied_head_shares_the_table_within_a_stage_and_not_across_stages(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    folder = save_model(config, tmp_path)
    whole, cut = load(folder), load(folder, stages=some_cut(2, 2, seed=1))
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    assert cut.lm_head.weight is not cut.model.embed_tokens.weight
    cut.tie_weights()
    assert cut.lm_head.weight is not cut.model.embed_tokens.weight
    assert torch.equal(whole(**SINGLE).logits, cut(**SINGLE).logits)


BROKEN_CUTS = {
    "a gap": ((0, 2, True, False), (3, 4, False, True)),
    "an overlap": ((0, 3, True, False), (2, 4, False, True)),
    "too few layers": ((0, 2, True, False), (2, 3, False, True)),
    "too many layers": ((0, 2, True, False), (2, 5, False, True)),
    "no head": ((0, 4, True, False),),
    "two embeddings": ((0, 2, True, False), (2, 4, True, True)),
    "an empty stage": ((0, 2, True, False), (2, 2, False, False), (2, 4, False, True)),
    "a reversed range": ((0, 4, True, False), (4, 3, False, False), (3, 4, False, True)),
    "no stages": (),
}


@pytest.mark.parametrize("fault", BROKEN_CUTS)
def test_stages_that_do_not_cover_the_model_once_are_refused(fault: str) -> None:
    stages = [StageRange("cpu", a, b, has_embedding=e, has_head=h) for a, b, e, h in BROKEN_CUTS[fault]]
    with pytest.raises(InputError) as caught:
        check_stages(stages, num_layers=4)
    assert caught.value.code == "E-STAGES"
