"""What the documentation of `generate()` promises, held by a chain of three stages and by the commands' own loop.

The chain is asked what the unsplit model is asked, and has to give the same scores, bit for bit. The commands' loop
gets the same wishes as a checkpoint's generation_config.json and has to give the same tokens.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import reference_model, some_cut
from tokenizers import Tokenizer, decoders, models
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from plans.errors import InputError, NumericalError, UsageError
from runtime import load
from runtime.cli.opening import merge_sampling
from runtime.engine.engine import Engine
from runtime.engine.heard import Heard
from runtime.engine.run import generate_requests
from runtime.generate.request import Generation, Request
from runtime.generate.rules import check_rules
from runtime.generate.stop_tokens import TokenStops
from runtime.prepared import Prepared, prepare_session
from runtime.reading.generation_config import end_tokens, score_rules, stop_strings
from runtime.reading.opening import open_source
from runtime.session import Session
from runtime.stages.chain import Chain

PROMPT = [7, 8, 9, 10, 11, 7, 8, 9, 10]
SHORT = [5, 9, 11]
NEW = 10
EOS = 2
SAMPLED: dict[str, Any] = {"do_sample": True, "top_k": 0}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One character per token, so that any text can be a stop string; id 2 is written <end>."""
    vocab = {chr(ord("A") + index): index for index in range(97)}
    plain = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="C", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def unsplit(tiny: Path) -> Any:
    return reference_model(tiny, dtype=torch.float32)


@pytest.fixture(scope="module")
def chain(tiny: Path) -> Chain:
    return load(tiny, stages=some_cut(4, 3, seed=7))


@pytest.fixture(scope="module")
def session(
    tiny: Path, chain: Chain, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Session:
    """The commands' view of the same chain."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("tiny") / "model")
    tokenizer.save_pretrained(folder)
    return Session(prepare_session(open_source(folder, model=None), device_map={}), chain, 0.0)


@pytest.fixture(scope="module")
def free(unsplit: Any) -> list[int]:
    """What the model says to PROMPT if nothing holds it back."""
    ids: list[int] = unsplit.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, eos_token_id=None)[0].tolist()
    return ids[len(PROMPT) :]


def padded() -> dict[str, torch.Tensor]:
    """Three prompts of different lengths, padded on the left."""
    rows = [SHORT, PROMPT, PROMPT[:6]]
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }


def both(chain: Chain, unsplit: Any, make: Callable[[Any], Any], *, seed: int = 3) -> Iterator[Any]:
    """Ask both models the same with the same random state."""
    for model in (unsplit, chain):
        torch.manual_seed(seed)
        yield make(model)


def assert_equal(expected: Any, found: Any) -> None:
    assert torch.equal(expected.sequences, found.sequences)
    for name in ("scores", "logits"):
        ours, theirs = getattr(found, name, None) or (), getattr(expected, name, None) or ()
        assert len(ours) == len(theirs)
        assert all(map(torch.equal, theirs, ours)), name


# What a call can ask of the model itself; "batch" are three left-padded prompts.
CALLS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "greedy, said": {"do_sample": False},
    "sampling": {"do_sample": True},
    "sampling, hot": {"do_sample": True, "temperature": 1.7, "top_k": 0},
    "sampling, all settings": {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "sampling, two answers": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beams, two answers": {"num_beams": 3, "num_return_sequences": 2},
    "beams, short ones": {"num_beams": 2, "length_penalty": -1.0, "early_stopping": True},
    "beams that never stop early": {"num_beams": 2, "early_stopping": "never"},
    "beams, sampled": {"num_beams": 2, "do_sample": True},
    "beams, no repeats": {"num_beams": 2, "no_repeat_ngram_size": 2},
    "guidance": {"guidance_scale": 1.5},
    "lookup in the prompt": {"prompt_lookup_num_tokens": 3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt in pieces": {"prefill_chunk_size": 4},
    "eos": {"eos_token_id": 40},
    "eos, a list": {"eos_token_id": [40, 41, 42]},
    "no eos": {"eos_token_id": None},
    "length": {"max_new_tokens": None, "max_length": 14},
    "one token": {"max_new_tokens": 1},
    "least length": {"min_length": 15, "eos_token_id": list(range(20, 60))},
    "repetition penalty": {"repetition_penalty": 1.6},
    "bad words": {"bad_words_ids": [[7], [8, 9]]},
}


IN_A_BATCH = ("nothing", "sampling", "beams, short ones", "guidance", "static cache", "prompt in pieces", "eos, a list",
              "length", "least length", "repetition penalty", "bad words")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rows"), [*((name, "one") for name in CALLS), *((name, "batch") for name in IN_A_BATCH)]
)
def test_a_chain_gives_the_scores_of_the_unsplit_model(name: str, rows: str, chain: Chain, unsplit: Any) -> None:
    inputs = padded() if rows == "batch" else {"input_ids": torch.tensor([PROMPT])}
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    assert_equal(*both(chain, unsplit, lambda model: model.generate(**inputs, **(options | CALLS[name]))))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_chain_in_half_precision_gives_the_scores_of_the_unsplit_model(dtype: str, tiny: Path) -> None:
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    models = reference_model(tiny, dtype=torch_dtype), load(tiny, stages=some_cut(4, 3, seed=7), dtype=dtype)
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True, "do_sample": True}
    assert_equal(*both(models[1], models[0], lambda model: model.generate(**padded(), **options)))


class _Shift(LogitsProcessor):
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.roll(int(input_ids[0, -1]), dims=-1)  # type: ignore[return-value]


class _AtThirteen(StoppingCriteria):
    def __call__(self, input_ids: torch.LongTensor, _scores: Any, **_kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 13)


class _Seen(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ids.append(-1)


OBJECTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "a processor of one's own": lambda _: {"logits_processor": [_Shift()]},
    "a criterion of one's own": lambda _: {"stopping_criteria": [_AtThirteen()]},
    "a function that allows tokens": lambda _: {"prefix_allowed_tokens_fn": lambda _row, ids: [int(ids[-1]) + 1, 3]},
    "an assistant": lambda unsplit: {"assistant_model": unsplit},
    "a cache": lambda unsplit: {"past_key_values": DynamicCache(config=unsplit.config)},
    "a configuration": lambda _: {"generation_config": GenerationConfig(do_sample=True, top_p=0.8, max_new_tokens=6)},
    "embeddings": lambda unsplit: {"inputs_embeds": unsplit.get_input_embeddings()(torch.tensor([PROMPT])).detach()},
}


@pytest.mark.parametrize("name", OBJECTS)
def test_a_chain_takes_every_object_that_generate_takes(name: str, chain: Chain, unsplit: Any) -> None:
    def ask(model: Any) -> Any:
        given = OBJECTS[name](unsplit)
        length = {} if "generation_config" in given else {"max_new_tokens": NEW}
        return model.generate(torch.tensor([PROMPT]), **length, **given)

    assert torch.equal(*both(chain, unsplit, ask))


def test_a_streamer_sees_the_prompt_then_every_token_then_the_end(chain: Chain, unsplit: Any) -> None:
    def ask(model: Any) -> tuple[list[int], list[int]]:
        seen = _Seen()
        ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, streamer=seen)
        return seen.ids, ids[0].tolist()

    (expected, _), (found, ids) = both(chain, unsplit, ask)
    assert found == expected == [*ids, -1]


def test_a_text_streamer_gives_the_text_of_the_answer(chain: Chain, tokenizer: PreTrainedTokenizerFast) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    ids = chain.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, eos_token_id=None, streamer=streamer)[0]
    assert "".join(streamer) == tokenizer.decode(ids[len(PROMPT) :])


def test_a_conversation_goes_on_from_the_cache_of_its_last_turn(chain: Chain, unsplit: Any) -> None:
    def ask(model: Any) -> list[int]:
        cache, ids = DynamicCache(config=model.config), torch.tensor([PROMPT])
        for turn in ([20, 21], [30], [40, 41, 42]):
            ids = model.generate(ids, max_new_tokens=4, past_key_values=cache, eos_token_id=None)
            ids = torch.cat([ids, torch.tensor([turn])], dim=1)
        result: list[int] = ids[0].tolist()
        return result

    expected, found = both(chain, unsplit, ask)
    assert found == expected


# What a checkpoint can ask of the commands. Lengths are those of generate() unless the checkpoint asks for others.
WISHES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "temperature": {**SAMPLED, "temperature": 0.7},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-k that nobody stated": {"do_sample": True},
    "top-p": {**SAMPLED, "top_p": 0.6},
    "min-p": {**SAMPLED, "min_p": 0.1},
    "top-h": {**SAMPLED, "top_h": 0.4},
    "typical": {**SAMPLED, "typical_p": 0.5},
    "epsilon": {**SAMPLED, "epsilon_cutoff": 0.02},
    "eta": {**SAMPLED, "eta_cutoff": 0.02},
    "all of sampling": {
        "do_sample": True,
        "temperature": 1.3,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.95,
        "epsilon_cutoff": 1e-3,
        "eta_cutoff": 1e-3,
        "repetition_penalty": 1.1,
        "renormalize_logits": True,
    },
    "settings of sampling that greedy leaves alone": {"do_sample": False, "typical_p": 0.5, "top_k": 3, "min_p": 0.5},
    "repetition penalty": {"repetition_penalty": 1.7},
    "reward for repeating": {"repetition_penalty": 0.6},
    "penalty on the prompt": {"encoder_repetition_penalty": 1.8},
    "no repeats": {"no_repeat_ngram_size": 1},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "nothing of the prompt": {"encoder_no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[7], [10, 11], [60]]},
    "bias": {"sequence_bias": [[[45], 9.0], [[45, 46], 12.0]]},
    "suppressed": {"suppress_tokens": list(range(0, 97, 2))},
    "suppressed at the beginning": {"begin_suppress_tokens": list(range(90))},
    "suppressed at the beginning, drawn": {**SAMPLED, "begin_suppress_tokens": list(range(90))},
    "a first token": {"forced_bos_token_id": 33},
    "a last token": {"forced_eos_token_id": 50},
    "several last tokens": {"forced_eos_token_id": [50, 51]},
    "finite values only": {"remove_invalid_values": True, "suppress_tokens": [5, 6]},
    "normal scores": {"renormalize_logits": True, **SAMPLED},
    "watermark": {"watermarking_config": {"greenlist_ratio": 0.3, "bias": 4.0}},
    "watermark, drawn": {**SAMPLED, "watermarking_config": {"seeding_scheme": "selfhash"}},
    "end, sooner and sooner": {"exponential_decay_length_penalty": [2, 3.0]},
    "end, several": {"eos_token_id": list(range(20, 60))},
    "no end before a length": {"eos_token_id": list(range(20, 60)), "min_length": 14},
    "no end before some tokens": {"eos_token_id": list(range(20, 60)), "min_new_tokens": 6},
    "no end before either": {"eos_token_id": list(range(20, 60)), "min_new_tokens": 4, "min_length": 18},
    "new tokens": {"max_new_tokens": 7},
    "length": {"max_new_tokens": None, "max_length": 15},
    "both lengths": {"max_new_tokens": 3, "max_length": 15},
    "a last token at a length": {"max_new_tokens": None, "max_length": 13, "forced_eos_token_id": 50},
    "everything at once": {
        **SAMPLED,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.2,
        "bad_words_ids": [[12]],
        "suppress_tokens": [13],
        "min_new_tokens": 3,
        "typical_p": 0.9,
        "sequence_bias": [[[45], 2.0]],
        "forced_eos_token_id": 2,
        "watermarking_config": {"bias": 1.0},
    },
}


def asked(session: Session, settings: dict[str, Any]) -> Prepared:
    """The model as if its generation_config.json said so."""
    config = GenerationConfig(**({"eos_token_id": EOS, "max_new_tokens": NEW} | settings))
    ends, _ = end_tokens(config, default=None, vocab_size=97)
    texts = stop_strings(config)
    stops = TokenStops(session.prepared.tokenizer, texts, where="x") if texts else None
    return replace(session.prepared, generation_config=config, eos_token_ids=ends, token_stops=stops)


def answer(
    session: Session,
    settings: dict[str, Any],
    *prompts: list[int],
    choices: dict[str, Any] | None = None,
    max_tokens: int | None = None,
    **options: Any,
) -> Generation:
    """What a command would make of prompts; `choices` are options of the command line."""
    prepared = asked(session, settings)
    sampling = merge_sampling(prepared, {"seed": 11} | (choices or {}))
    limits = prepared.limits(max_tokens=max_tokens)
    requests = [Request(prompt_ids=p, sampling=sampling, limits=limits) for p in prompts]
    return generate_requests(session, requests, **options)


def promised(unsplit: Any, settings: dict[str, Any], prompt: list[int], **options: Any) -> list[int]:
    """The new tokens of `generate()` itself."""
    config = GenerationConfig(**({"eos_token_id": EOS, "max_new_tokens": NEW} | settings))
    torch.manual_seed(11)
    ids: list[int] = unsplit.generate(torch.tensor([prompt]), generation_config=config, **options)[0].tolist()
    return ids[len(prompt) :]


def test_the_wishes_make_a_difference(session: Session) -> None:
    same = {"nothing", "settings of sampling that greedy leaves alone", "finite values only", "normal scores"}
    unheard = set()
    for name in WISHES.keys() - same - {"top-k that nobody stated"}:
        prompt, settings = FIRST if name == "a first token" else PROMPT, WISHES[name]
        plain = answer(session, {"do_sample": settings.get("do_sample")} | UNSTATED, prompt)
        if tokens_of(answer(session, settings, prompt)) == tokens_of(plain):
            unheard.add(name)
    assert not unheard


UNSTATED: dict[str, Any] = {"top_k": 0}
FIRST = [5]
FROM_ONE_TOKEN = ("nothing", "a first token", "penalty on the prompt", "suppressed at the beginning", "watermark",
                  "everything at once")  # fmt: skip


@pytest.mark.row("P18")
@pytest.mark.parametrize(
    ("name", "prompt"), [*((name, PROMPT) for name in WISHES), *((name, FIRST) for name in FROM_ONE_TOKEN)]
)
def test_the_commands_choose_the_tokens_that_generate_chooses(
    name: str, prompt: list[int], session: Session, unsplit: Any
) -> None:
    settings = WISHES[name]
    check_rules(score_rules(GenerationConfig(**settings)), vocab_size=97, eos_token_ids={EOS}, where="x")
    assert tokens_of(answer(session, settings, prompt)) == promised(unsplit, settings, prompt)


def tokens_of(generation: Generation) -> list[int]:
    return list(generation.sequences[0].token_ids)


@pytest.mark.row("P18")
@pytest.mark.parametrize("name", ["no repeated pairs", "nothing of the prompt", "everything at once", "watermark"])
def test_in_a_padded_batch_every_sequence_gets_what_it_gets_alone(name: str, session: Session) -> None:
    alone = [tokens_of(answer(session, WISHES[name], prompt)) for prompt in (SHORT, PROMPT)]
    together = answer(session, WISHES[name], SHORT, PROMPT, SHORT)
    assert [list(s.token_ids) for s in together.sequences] == [alone[0], alone[1], alone[0]]


@pytest.mark.row("P18")
def test_options_go_before_what_the_checkpoint_asks(session: Session, unsplit: Any) -> None:
    wishes = {"do_sample": True, "temperature": 0.5, "repetition_penalty": 1.5, "typical_p": 0.7, "top_p": 0.9}
    greedy = promised(unsplit, wishes | {"do_sample": False}, PROMPT)
    assert tokens_of(answer(session, wishes, PROMPT, choices={"temperature": 0.0})) == greedy
    warm = promised(unsplit, wishes | {"temperature": 1.4, "top_p": 0.8}, PROMPT)
    assert tokens_of(answer(session, wishes, PROMPT, choices={"temperature": 1.4, "top_p": 0.8})) == warm
    drawn = promised(unsplit, wishes | {"top_k": 0}, PROMPT)
    stated = wishes | {"do_sample": False}
    assert tokens_of(answer(session, stated, PROMPT, choices={"temperature": 0.5})) == drawn
    lengths = {"max_new_tokens": 3, "max_length": 5}
    assert len(tokens_of(answer(session, lengths, PROMPT, max_tokens=8))) == 8


@pytest.mark.row("P18")
def test_a_checkpoints_length_ends_at_the_context_and_a_prompt_beyond_it_is_refused(session: Session) -> None:
    longest = session.prepared.context_tokens
    generation = answer(session, {"max_new_tokens": 4000}, [5] * (longest - 3))
    assert len(tokens_of(generation)) == 3
    with pytest.raises(
        UsageError, match=r"has 9 tokens, and generation_config\.json ends every sequence at max_length 9"
    ):
        answer(session, {"max_new_tokens": None, "max_length": 9}, PROMPT)


def stops(free: list[int], tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Stop strings that occur in what the model says to PROMPT, and one that begins in the prompt."""
    text, before = tokenizer.decode(free), tokenizer.decode(PROMPT)
    return {
        "one token": text[4],
        "three tokens": text[3:6],
        "from the prompt on": before[-2:] + text[0],
        "none": "AA",
    }


@pytest.mark.row("P18")
@pytest.mark.parametrize("name", ["one token", "three tokens", "from the prompt on", "none"])
def test_stop_strings_end_where_generate_ends(
    name: str, session: Session, unsplit: Any, free: list[int], tokenizer: PreTrainedTokenizerFast
) -> None:
    text = stops(free, tokenizer)[name]
    wishes = {"stop_strings": [text, "BBB"], "eos_token_id": None}
    found = answer(session, wishes, PROMPT, decode=tokenizer.decode).sequences[0]
    assert list(found.token_ids) == promised(unsplit, wishes, PROMPT, tokenizer=tokenizer)
    assert found.finish_reason == ("length" if name == "none" else "stop_string")
    assert text not in found.text


@pytest.mark.row("P18")
def test_a_stop_string_that_is_a_special_token_ends_a_text_that_never_shows_it(
    session: Session, unsplit: Any, free: list[int], tokenizer: PreTrainedTokenizerFast
) -> None:
    special = tokenizer.convert_ids_to_tokens(free[2])
    wishes = {"stop_strings": special, "eos_token_id": None}
    hidden = answer(session, wishes, PROMPT, decode=lambda ids: tokenizer.decode([i for i in ids if i != free[2]]))
    first = free.index(free[2])
    assert hidden.sequences[0].finish_reason == "stop_string"
    assert tokens_of(hidden) == free[: first + 1] == promised(unsplit, wishes, PROMPT, tokenizer=tokenizer)
    assert hidden.sequences[0].text == tokenizer.decode(free[:first])


def test_a_stop_string_that_no_tokens_spell_is_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"generation_config.json:/stop_strings: no tokens spell one of '\u4e2d'"):
        TokenStops(tokenizer, ["\u4e2d"], where="generation_config.json")


@pytest.mark.row("P18")
def test_an_end_beyond_the_vocabulary_ends_nothing(session: Session, unsplit: Any) -> None:
    for ends in (5000, [5000, 40], [-1]):
        wishes = {"eos_token_id": ends, "min_new_tokens": 2}
        assert tokens_of(answer(session, wishes, PROMPT)) == promised(unsplit, wishes, PROMPT)
    config = GenerationConfig(eos_token_id=[5000, -1, 40])
    assert end_tokens(config, default=7, vocab_size=97) == (frozenset({40}), [5000, -1])


def test_a_turn_that_goes_on_from_a_cache_follows_the_rules_of_the_whole(session: Session, unsplit: Any) -> None:
    wishes = {"no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 3, "max_new_tokens": 4}
    prepared, engine, ids = asked(session, wishes), Engine(session), list(PROMPT)
    for turn in ([20, 21], [30], [40, 41, 42]):
        heard = Heard()
        request = Request(
            prompt_ids=ids, sampling=merge_sampling(prepared, {}), limits=prepared.limits(max_tokens=None)
        )
        engine.submit(request, on_event=heard, reuse_key="mine")
        engine.run_all()
        assert heard.token_ids == promised(unsplit, wishes, ids)
        ids = [*ids, *heard.token_ids, *turn]
    assert heard.usage is not None
    assert heard.usage.num_cached_tokens > len(PROMPT)


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "bad_words_ids": {"bad_words_ids": [[500]]},
    "sequence_bias": {"sequence_bias": [[[500], 1.0]]},
    "forced_bos_token_id": {"forced_bos_token_id": 500},
    "forced_eos_token_id": {"forced_eos_token_id": [3, 500]},
    "watermarking_config": {"watermarking_config": {"seeding_scheme": "none of them"}},
}


@pytest.mark.row("P18")
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_rule_that_transformers_cannot_follow_is_refused_by_name_before_loading(name: str) -> None:
    with pytest.raises((InputError, ValueError), match=name if name != "watermarking_config" else "seeding_scheme"):
        check_rules(
            score_rules(GenerationConfig(**IMPOSSIBLE[name])), vocab_size=97, eos_token_ids={EOS}, where="file.json"
        )


@pytest.mark.row("R12")
def test_rules_that_leave_no_token_are_an_error_and_not_a_token(session: Session) -> None:
    for wishes in ({"suppress_tokens": list(range(97))}, {"suppress_tokens": list(range(97)), **SAMPLED}):
        with pytest.raises(NumericalError, match=r"leave no token .*generation_config\.json: suppress_tokens"):
            answer(session, wishes, PROMPT)
