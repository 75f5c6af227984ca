"""The commands' generation loop: generate()'s tokens, with limits, text, measurements and clear refusals."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import reference_model, some_cut
from transformers import AutoTokenizer

from plans.errors import UsageError
from runtime import load
from runtime.engine.run import generate
from runtime.generate.limits import Limits
from runtime.generate.numerics import NonFiniteError
from runtime.generate.request import Generation
from runtime.generate.sampling import Sampling
from runtime.stages.chain import Chain

PROMPT = [7, 8, 9, 10, 11, 7, 8, 9, 10]
SHORT = [5, 9, 11]

SAMPLINGS = {
    "greedy": Sampling(),
    "greedy with a penalty": Sampling(repetition_penalty=1.4),
    "plain sampling": Sampling(temperature=1.0, seed=4),
    "everything": Sampling(temperature=0.8, top_k=30, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=2**63 + 5),
}


@pytest.fixture(scope="module")
def chain(tiny: Path) -> Chain:
    return load(tiny, stages=some_cut(4, 3, seed=7))


@pytest.fixture(scope="module")
def unsplit(tiny: Path) -> Any:
    return reference_model(tiny, dtype=torch.float32)


def run(chain: Chain, *prompts: list[int], sampling: Sampling | None = None, **options: Any) -> Generation:
    limits = Limits(**{"context_tokens": 256, "max_tokens": 40} | options.pop("limits", {}))
    return generate(chain, prompts, sampling=sampling or Sampling(), limits=limits, **options)


def options_of(sampling: Sampling) -> dict[str, Any]:
    if sampling.is_greedy:
        return {"repetition_penalty": sampling.repetition_penalty}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {"do_sample": True} | {name: getattr(sampling, name) for name in names}


@pytest.mark.parametrize("chunk", [None, 4], ids=["whole prompt", "chunked"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_at_batch_one_the_tokens_are_those_of_generate(
    name: str, chunk: int | None, chain: Chain, unsplit: Any
) -> None:
    sampling = SAMPLINGS[name]
    torch.manual_seed(sampling.seed)
    expected = unsplit.generate(
        torch.tensor([PROMPT]), max_new_tokens=40, eos_token_id=2, prefill_chunk_size=chunk, **options_of(sampling)
    )[0, len(PROMPT) :].tolist()
    limits = {"eos_token_ids": frozenset({2}), "prefill_chunk_tokens": chunk}
    assert list(run(chain, PROMPT, sampling=sampling, limits=limits).sequences[0].token_ids) == expected


def test_a_left_padded_greedy_batch_gives_the_tokens_of_generate(chain: Chain, unsplit: Any) -> None:
    ids = torch.tensor([[0] * 6 + SHORT, PROMPT])
    mask = torch.tensor([[0] * 6 + [1] * 3, [1] * 9])
    expected = unsplit.generate(ids, attention_mask=mask, max_new_tokens=40, eos_token_id=None)[:, 9:].tolist()
    found = run(chain, SHORT, PROMPT)
    assert [list(s.token_ids) for s in found.sequences] == expected


@pytest.mark.row("R9")
def test_the_same_seed_gives_the_same_tokens_for_every_cut(tiny: Path, chain: Chain) -> None:
    sampling = SAMPLINGS["everything"]
    expected = run(chain, SHORT, PROMPT, SHORT, sampling=sampling)
    assert run(chain, SHORT, PROMPT, SHORT, sampling=sampling).sequences == expected.sequences
    for seed in (0, 9):
        other = load(tiny, stages=some_cut(4, 2, seed=seed))
        assert run(other, SHORT, PROMPT, SHORT, sampling=sampling).sequences == expected.sequences
    assert expected.sequences[0].token_ids != expected.sequences[2].token_ids


def test_sampling_leaves_the_global_random_state_alone(chain: Chain) -> None:
    before = torch.get_rng_state()
    run(chain, PROMPT, sampling=SAMPLINGS["everything"])
    assert torch.equal(before, torch.get_rng_state())


def test_a_finished_sequence_stays_finished_while_others_go_on(chain: Chain) -> None:
    free = run(chain, SHORT, PROMPT).sequences
    eos = free[0].token_ids[3]
    first = free[0].token_ids.index(eos)
    stopped = run(chain, SHORT, PROMPT, limits={"eos_token_ids": frozenset({eos})}).sequences
    assert stopped[0].token_ids == free[0].token_ids[: first + 1]
    assert stopped[0].finish_reason == "eos"
    expected = free[1].token_ids
    expected = expected[: expected.index(eos) + 1] if eos in expected else expected
    assert stopped[1].token_ids == expected


def test_text_is_streamed_piece_by_piece_and_adds_up(shipped: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    chain = load(shipped, stages=some_cut(7, 3, seed=5))
    prompt = tokenizer("class Parser:\n    def ")["input_ids"]
    pieces: list[str] = []
    found = run(
        chain,
        prompt,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        on_text=lambda _index, piece: pieces.append(piece),
    ).sequences[0]
    assert "".join(pieces) == found.text
    assert len(pieces) > 5
    both = tokenizer.decode(prompt + list(found.token_ids), skip_special_tokens=True)
    assert both == tokenizer.decode(prompt, skip_special_tokens=True) + found.text


def letters(token_ids: Any) -> str:
    """One letter per token."""
    return "".join(chr(ord("A") + token) for token in token_ids)


def test_a_stop_string_ends_a_sequence_across_tokens_and_is_not_part_of_the_text(chain: Chain) -> None:
    free = run(chain, PROMPT, decode=letters).sequences[0]
    assert free.finish_reason == "length"
    stop = free.text[4:7]
    cut = free.text.index(stop)
    found = run(chain, PROMPT, decode=letters, limits={"stop_strings": (stop,)}).sequences[0]
    assert found.text == free.text[:cut]
    assert found.finish_reason == "stop_string"
    assert found.token_ids == free.token_ids[: cut + 3]


def test_an_end_of_sequence_token_is_counted_and_not_printed(chain: Chain) -> None:
    first = run(chain, PROMPT).sequences[0].token_ids[0]
    found = run(chain, PROMPT, decode=letters, limits={"eos_token_ids": frozenset({first})}).sequences[0]
    assert (found.token_ids, found.text, found.finish_reason) == ((first,), "", "eos")


def test_zero_new_tokens_computes_nothing(chain: Chain) -> None:
    found = run(chain, PROMPT, limits={"max_tokens": 0})
    assert found.sequences[0].token_ids == ()
    assert found.sequences[0].finish_reason == "length"
    assert found.step_seconds == ()


@pytest.mark.parametrize(("length", "expected"), [(15, 1), (16, 0)])
def test_without_a_limit_generation_ends_with_the_context(length: int, expected: int, chain: Chain) -> None:
    limits = {"context_tokens": 16, "max_tokens": None}
    found = run(chain, [5] * length, limits=limits).sequences[0]
    assert (len(found.token_ids), found.finish_reason) == (expected, "length")


@pytest.mark.row("R4")
def test_exactly_filling_the_context_is_allowed_and_one_more_is_refused(chain: Chain) -> None:
    assert run(chain, PROMPT, limits={"context_tokens": 12, "max_tokens": 3}).num_new_tokens == 3
    with pytest.raises(UsageError, match=r"9 prompt tokens and 4 new ones are 1 more than the context holds \(12\)"):
        run(chain, PROMPT, limits={"context_tokens": 12, "max_tokens": 4})
    with pytest.raises(UsageError, match=r"9 prompt tokens and 0 new ones are 1 more than the context holds \(8\)"):
        run(chain, PROMPT, limits={"context_tokens": 8, "max_tokens": None})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "has no tokens"), ([5, 97], "token id 97"), ([-1], "token id -1"), ([1.0], "token id 1.0"), ([True], "True")],
)
def test_prompts_that_are_no_token_ids_are_refused(prompt: list[Any], message: str, chain: Chain) -> None:
    with pytest.raises(UsageError, match=f"prompt 1: .*{message}"):
        run(chain, PROMPT, prompt)


def test_no_prompts_and_stop_strings_without_text_are_refused(chain: Chain) -> None:
    with pytest.raises(UsageError, match="there is no prompt"):
        run(chain)
    with pytest.raises(UsageError, match="stop strings need a tokenizer"):
        run(chain, PROMPT, limits={"stop_strings": ("x",)})


def test_stages_are_measured_when_asked_and_hooks_are_gone_afterwards(chain: Chain) -> None:
    found = run(chain, PROMPT, measure_stages=True)
    assert len(found.prefill_stages) == len(found.decode_stages) == 3
    assert all(stage.compute_seconds > 0 for stage in found.decode_stages)
    assert found.decode_stages[0].hop_seconds == 0
    assert sum(stage.compute_seconds + stage.hop_seconds for stage in found.decode_stages) < sum(found.step_seconds)
    assert len(found.step_seconds) == 39
    assert found.decode_tokens_per_second > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in chain.modules())
    assert run(chain, PROMPT).decode_stages == ()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_non_finite_logits_name_the_stage_and_the_step_and_print_nothing(stage: int, tiny: Path) -> None:
    chain = load(tiny, stages=some_cut(4, 3, seed=7))
    module = chain.stage_modules(stage)[-1]
    printed: list[str] = []
    calls = 0

    def break_later(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output if calls <= 3 else output * float("nan")

    module.register_forward_hook(break_later)
    with pytest.raises(NonFiniteError, match=rf"step 3: NaN or infinity in stage {stage} \(") as caught:
        run(chain, PROMPT, decode=letters, on_text=lambda _index, piece: printed.append(piece))
    assert (caught.value.stage, caught.value.step) == (stage, 3)
    assert caught.value.exit_code == 8
    assert len("".join(printed)) == 3


def test_two_generations_on_one_checkpoint_do_not_disturb_each_other(tiny: Path, chain: Chain) -> None:
    sampling = SAMPLINGS["everything"]
    expected = run(chain, PROMPT, sampling=sampling).sequences
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(run(load(tiny), PROMPT, sampling=sampling).sequences))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected, expected]
