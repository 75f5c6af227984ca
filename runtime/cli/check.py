"""`llamarun check`: is the chain the unsplit model?"""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plans.commands.option_groups import ScreenOptions, with_option_groups
from plans.errors import IntegrityError
from runtime.cli import options
from runtime.cli.opening import load, prepare

if TYPE_CHECKING:
    from runtime.prepared import Prepared

CHECK_PROMPTS = ("def main(argv: list[str]) -> int:\n", "import os\n", "The quick brown fox jumps over the lazy dog.")


RANDOM_LENGTHS = (13, 4, 9)
"""Tokens of the prompts where no tokenizer makes them of text."""


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
    against: Annotated[Path, typer.Option("--against", help="The unsplit checkpoint.")],
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

    Ends with exit code 5 if anything differs.

    Example: llamarun check shards/ --against checkpoint/
    """
    output = screen.output()
    loading = options.LoadingOptions(model=model, device_map=device_map, dtype=dtype, threads=threads)
    prepared = prepare(output, target, loading, needs_text=False)

    from runtime.stages.parity import compare_models, load_unsplit

    prompts = _prompts(prepared)
    if prepared.own_tokenizer is None:
        output.note("no tokenizer: the prompts are random token ids")
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
