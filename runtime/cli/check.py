"""`llamarun check`: is the chain the unsplit model, or how far is it from the one its weights were rounded from?"""

import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plans.commands.option_groups import ScreenOptions, with_option_groups
from plans.errors import InputError, IntegrityError, UsageError
from runtime.cli import options
from runtime.cli.opening import load, prepare

if TYPE_CHECKING:
    from plans.commands.console import Output
    from runtime.prepared import Prepared

CHECK_PROMPTS = ("def main(argv: list[str]) -> int:\n", "import os\n", "The quick brown fox jumps over the lazy dog.")


RANDOM_LENGTHS = (13, 4, 9)
"""Tokens of the prompts where no tokenizer makes them of text."""

EXACT_DTYPE = "fp32"
"""Rounding of activations to bf16 would hide what rounding of weights does."""
TEXT_TOKENS = 8192
WINDOW_TOKENS = 512


def _prompts(prepared: "Prepared") -> list[list[int]]:
    from runtime.reading.tokenizer import encode_prompt

    if prepared.own_tokenizer is None:
        draw = random.Random(0)
        return [[draw.randrange(prepared.vocab_size) for _ in range(length)] for length in RANDOM_LENGTHS]
    return [encode_prompt(prepared.own_tokenizer, text, parses_special=False) for text in CHECK_PROMPTS]


@with_option_groups
def check(
    target: options.Target,
    *,
    against: Annotated[
        Path,
        typer.Option("--against", help="The unsplit checkpoint, or the original of packed weights."),
    ],
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="With the original of packed weights: compare on this text."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "--max-new-tokens", "-n", min=1, max=10_000, help="Greedy tokens to compare.")
    ] = 32,
    model: options.ModelOption = None,
    device_map: options.DeviceMapOption = None,
    dtype: options.DtypeOption = None,
    threads: options.ThreadsOption = None,
    screen: ScreenOptions,
) -> None:
    """Compare a split model with the unsplit one: logits bit for bit, and greedy tokens.

    Ends with exit code 5 if anything differs. With packed weights and the original they were rounded from, both are
    computed in fp32 (or --dtype), and what is said is the mean KL per token, and at how many the likeliest differs.

    Example: llamarun check shards/ --against checkpoint/
    """
    output = screen.output()
    loading = options.LoadingOptions(model=model, device_map=device_map, dtype=dtype, threads=threads)
    prepared = prepare(output, target, loading, needs_text=False)
    if prepared.own_tokenizer is None and text is None:
        output.note("no tokenizer: the prompts are random token ids")
    if _is_original(against, prepared):
        exact = prepared if dtype is not None else replace(prepared, dtype=EXACT_DTYPE, kv_cache_dtype=EXACT_DTYPE)
        _report_distance(output, exact, against, text=text, max_tokens=max_tokens)
    elif text is not None:
        raise UsageError("--text belongs to packed weights and the original they were made from", where=against)
    else:
        _check_parity(output, prepared, against, target=target, max_tokens=max_tokens)


def _is_original(against: Path, prepared: "Prepared") -> bool:
    """Whether packed weights are to be compared with weights that are not."""
    from plans.checkpoint.cache import find_snapshot
    from plans.checkpoint.units import CONFIG_NAME
    from plans.config.config import read_config

    if prepared.source.checkpoint.config.packing is None:
        return False
    return read_config(find_snapshot(against) / CONFIG_NAME).quantization is None


def _report_distance(
    output: "Output", prepared: "Prepared", original: Path, *, text: Path | None, max_tokens: int
) -> None:
    from runtime.reading.experts import compute_experts_in
    from runtime.stages.distance import continued, measure_distance
    from runtime.stages.parity import load_unsplit

    prompts = _prompts(prepared) if text is None else _windows(prepared, text)
    session = load(output, prepared, cache_tokens=max(map(len, prompts)) + max_tokens)
    compute_experts_in(session.chain, session.chain.dtype)
    whole = load_unsplit(original, dtype=session.chain.dtype)
    with output.spinner("comparing", style="line"):
        texts = continued(whole, prompts, num_tokens=max_tokens) if text is None else prompts
        found = measure_distance(session.chain, whole, texts)
    output.data(asdict(found))
    share = found.num_different / found.num_tokens
    output.show(
        f"mean KL to the original: {found.mean_kl:.3g} per token; "
        f"another token is likeliest at {found.num_different} of {found.num_tokens} ({share:.1%})"
    )
    what = "the check's prompts and what the original says to them" if text is None else f"the beginning of {text}"
    output.note(f"on {what}, both computed in {prepared.dtype}")


def _windows(prepared: "Prepared", path: Path) -> list[list[int]]:
    """Return the beginning of a text in windows of token ids."""
    from plans.reading.files import read_limited
    from runtime.reading.tokenizer import MAX_PROMPT_BYTES, first_tokens, missing_tokenizer, read_prompt

    tokenizer = prepared.own_tokenizer
    if tokenizer is None:
        raise missing_tokenizer(prepared.source.folder)
    words = read_prompt(read_limited(path, max_bytes=MAX_PROMPT_BYTES), where=path)
    ids = first_tokens(tokenizer, words, num_tokens=TEXT_TOKENS)
    if not ids:
        raise InputError("holds no text", where=path, code="E-TEXT")
    size = min(WINDOW_TOKENS, prepared.context_tokens, len(ids))
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


def _check_parity(output: "Output", prepared: "Prepared", against: Path, *, target: Path, max_tokens: int) -> None:
    from runtime.stages.parity import compare_models, load_unsplit

    prompts = _prompts(prepared)
    session = load(output, prepared, cache_tokens=max(map(len, prompts)) + max_tokens, batch_size=len(prompts))
    unsplit = load_unsplit(against, dtype=session.chain.dtype)
    results = compare_models(session.chain, unsplit, prompts, num_tokens=max_tokens, chunk_tokens=3)
    is_identical = all(result.is_identical for result in results)
    cases = [
        {"case": r.case, "values": r.num_values, "different": r.num_different, "max_abs": r.max_abs_difference}
        for r in results
    ]
    output.data({"is_identical": is_identical, "cases": cases})
    for result in results:
        verdict = "identical" if result.is_identical else f"{result.num_different} differ"
        output.show(f"{verdict:>12}  {result.case} ({result.num_values} values)")
    if not is_identical:
        worst = max(result.max_abs_difference for result in results)
        raise IntegrityError(f"differs from the unsplit model by up to {worst:.3g}", where=target, code="E-PARITY")
    output.note(f"{len(session.chain.stages)} stages equal the unsplit model of {against}, bit for bit")
