"""Choosing tokens: the same as generate() with a seed, and independent of what else is in the batch."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import reference_model
from transformers import GenerationConfig

from plans.errors import NumericalError, UsageError
from runtime.generate.rules import make_processors
from runtime.generate.sampling import MAX_SEED, Sampling
from runtime.generate.token_chooser import TokenChooser, sequence_seed


def test_the_processors_are_those_of_generate_in_the_same_order(tiny: Path) -> None:
    model = reference_model(tiny, dtype=torch.float32)
    settings = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    config = GenerationConfig(do_sample=True, **settings)
    expected = model._get_logits_processor(generation_config=config, input_ids_seq_length=1)
    found = make_processors(Sampling(**settings), vocab_size=97, prompt_ids=torch.tensor([3, 3, 5]))
    assert [type(p) for p in found] == [type(p) for p in expected]
    logits, ids = torch.randn(1, 97), torch.tensor([[3, 3, 5]])
    assert torch.equal(found(ids, logits.clone()), expected(ids, logits.clone()))


def test_values_that_change_nothing_add_no_processor() -> None:
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=0, top_k=40, top_p=0.5, min_p=0.1)):
        assert not make_processors(sampling, vocab_size=97, prompt_ids=torch.tensor([3]))


def test_temperature_zero_is_greedy() -> None:
    chooser = TokenChooser(Sampling(), sequence_index=0)
    assert chooser.is_plain_argmax
    assert chooser.choose(torch.tensor([0.0, 3.0, 2.0]), token_ids=torch.tensor([1])) == 1


def test_a_repetition_penalty_also_works_without_sampling() -> None:
    chooser = TokenChooser(Sampling(repetition_penalty=2.0), sequence_index=0)
    assert chooser.choose(torch.tensor([0.5, 3.0, 2.0]), token_ids=torch.tensor([1])) == 2


def test_the_first_sequence_uses_the_seed_itself_and_the_others_their_own() -> None:
    seeds = [sequence_seed(5, index) for index in range(100)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 100
    assert all(0 <= seed <= MAX_SEED for seed in seeds)
    assert sequence_seed(6, 1) != seeds[1]


@pytest.mark.row("R9")
def test_a_sequences_draws_do_not_depend_on_what_else_is_drawn() -> None:
    sampling, logits, ids = Sampling(temperature=1.0, seed=9), torch.randn(97), torch.tensor([1])
    alone = TokenChooser(sampling, sequence_index=2)
    expected = [alone.choose(logits, token_ids=ids) for _ in range(20)]
    among = [TokenChooser(sampling, sequence_index=index) for index in range(4)]
    drawn = [[chooser.choose(logits, token_ids=ids) for chooser in among] for _ in range(20)]
    assert [row[2] for row in drawn] == expected
    assert [row[1] for row in drawn] != expected


def test_the_largest_seed_works() -> None:
    chooser = TokenChooser(Sampling(temperature=1.0, seed=MAX_SEED), sequence_index=0)
    assert 0 <= chooser.choose(torch.zeros(5), token_ids=torch.tensor([1])) < 5


def test_no_token_left_is_an_error_and_not_a_token() -> None:
    chooser = TokenChooser(Sampling(temperature=1.0), sequence_index=0)
    with pytest.raises(NumericalError, match="leave no token to choose from"):
        chooser.choose(torch.full((4,), -math.inf), token_ids=torch.tensor([1]))


BAD: list[dict[str, Any]] = [
    {"temperature": -1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": True},
    {"top_k": -1},
    {"top_p": 0},
    {"top_p": 1.1},
    {"top_p": math.nan},
    {"min_p": -0.1},
    {"min_p": 1.5},
    {"repetition_penalty": 0},
    {"repetition_penalty": math.nan},
    {"seed": -1},
    {"seed": MAX_SEED + 1},
]


@pytest.mark.parametrize("settings", BAD, ids=str)
def test_values_out_of_range_are_refused_by_their_option_name(settings: dict[str, Any]) -> None:
    option = next(iter(settings)).replace("_", "-")
    with pytest.raises(UsageError, match=f"--{option} is "):
        Sampling(**settings)


def test_a_checkpoints_defaults_are_what_generate_would_do() -> None:
    assert Sampling.from_generation_config(GenerationConfig()).is_greedy
    sampled = Sampling.from_generation_config(GenerationConfig(do_sample=True, temperature=0.6), seed=4)
    assert sampled == Sampling(temperature=0.6, top_k=50, seed=4)
