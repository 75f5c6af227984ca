"""Which units a stage holds: keys, words, and where stages stop being a chain."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.stages import StageRange, chain_fault, stage_names
from tests.planner.cases import tiny_profile

PROFILE = tiny_profile()
WORDS = {
    "everything": ((0, 4, True, True), "embedding, layers 0-3, head", "emb + 0-3 + head"),
    "two layers": ((1, 3, False, False), "layers 1-2", "1-2"),
    "one layer": ((2, 3, False, True), "layer 2, head", "2 + head"),
    "one end": ((0, 0, True, False), "embedding", "emb"),
    "nothing": ((2, 2, False, False), "", ""),
}


@pytest.mark.parametrize(("held", "words", "short"), WORDS.values(), ids=WORDS)
def test_a_stage_is_said_in_two_spellings(held: tuple[int, int, bool, bool], words: str, short: str) -> None:
    stage = StageRange("cpu", *held)
    assert (stage.words, stage.short_words) == (words, short)


def test_stages_are_numbered_from_0() -> None:
    parts = (replace(StageRange.whole(3), has_head=False), StageRange("cpu", 3, 4, False, True))
    assert stage_names(parts) == ["stage 0 (embedding, layers 0-2)", "stage 1 (layer 3, head)"]
    fault = chain_fault((parts[0], replace(parts[1], start_layer=4)), num_layers=4)
    assert str(fault) == "stage 1: layers from 4 leave a gap"


@given(st.integers(0, 4), st.integers(0, 4), st.booleans(), st.booleans())
def test_keys_units_and_owner_agree(start: int, end: int, has_embedding: bool, has_head: bool) -> None:
    stage = StageRange("cpu", min(start, end), max(start, end), has_embedding, has_head)
    every = [(unit.kind, unit.index) for unit in PROFILE.units]
    assert list(stage.keys) == [key for key in every if stage.owns(key)]
    assert [(unit.kind, unit.index) for unit in stage.units(PROFILE)] == list(stage.keys)
    assert len(stage.keys) == stage.num_layers + has_embedding + has_head
    assert stage.is_empty is (not stage.keys)


@given(st.lists(st.integers(0, 4), max_size=3))
def test_every_cut_without_an_empty_stage_is_a_chain_and_of_one_model_only(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), 4]
    last = len(edges) - 2
    stages = [StageRange("cpu", edges[i], edges[i + 1], i == 0, i == last) for i in range(last + 1)]
    fault = chain_fault(stages, num_layers=4)
    assert (fault is None) == all(stage.keys for stage in stages)
    assert chain_fault(stages, num_layers=5) is not None
    assert chain_fault(stages[1:], num_layers=4) is not None


def test_a_range_of_hostile_length_is_judged_without_counting_it_out() -> None:
    assert chain_fault([StageRange.whole(2**40)], num_layers=4) is not None
