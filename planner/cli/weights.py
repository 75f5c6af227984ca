"""`llamaplan sensitivity`, and `--weights auto` of solve: they parse, call the planner, and print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli import ask, options
from planner.cli.next_steps import shown
from plans.commands.console import Output
from plans.commands.option_groups import ScreenOptions, with_option_groups
from plans.errors import InputError, UsageError

if TYPE_CHECKING:
    from planner.answers.ladder import LadderAnswer, Solve
    from planner.problem.question import Question
    from planner.program.effort import Effort
    from plans.plan import Plan
    from plans.sensitivity import PartialSensitivity, Sensitivity, SensitivitySubject

TokensOption = Annotated[
    int, typer.Option("--tokens", min=32, max=1 << 20, help="How much of the text is read, at most.")
]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("sensitivity")(sensitivity_command)


@with_option_groups
def sensitivity_command(
    model: options.ModelArgument,
    *,
    text: Annotated[
        Path, typer.Option("--text", metavar="FILE", help="Text of the kind the model is for.", show_default=False)
    ],
    tokens: TokensOption = 2048,
    dtype: options.DtypeOption = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The file to write; a part of it lies beside it first."),
    ] = Path("sensitivity.json"),
    printed: ScreenOptions,
) -> None:
    """Measure what storing each layer in 4 bits costs, for 'solve --weights auto'; an interrupted run goes on.

    Example: llamaplan sensitivity my-model/ --text some.txt -o sens.json
    """
    from planner.model.find import find_model
    from planner.model.packed import check_packable
    from planner.model.workloads import parse_dtype
    from planner.show import sensitivity as show
    from plans.checkpoint.folder import open_checkpoint
    from plans.checkpoint.run_dtype import run_dtype
    from plans.checkpoint.units import require_full
    from plans.reading.files import read_limited, write_text

    screen = printed.output()
    checkpoint = open_checkpoint(find_model(model))
    ask.refuse_inside(output, require_full(checkpoint))
    chosen = parse_dtype(dtype) or run_dtype(checkpoint)
    check_packable(checkpoint, dtype=chosen, asked="sensitivity")
    if checkpoint.config.num_experts:
        raise UsageError(
            "sensitivity: transformers reads the experts of all layers in one width, so that there is no mix to choose",
            where=checkpoint.path,
            hint="'llamaplan solve --weights auto' takes the widest width that fits",
            code="E-WEIGHTS",
        )
    data = read_limited(text, max_bytes=MAX_TEXT_BYTES)
    with screen.leaving_at_once():
        from planner.measure.sensitivity import measure_sensitivity, subject_of, windows_of
    windows = windows_of(checkpoint, data, num_tokens=tokens, where=text)
    subject = subject_of(checkpoint, windows, data, dtype=chosen)
    partial = output.with_name(f"{output.name}.partial")
    with screen.progress("reading the text", unit="items") as bar:
        found = measure_sensitivity(
            checkpoint, windows, known=known_part(partial, subject, screen), progress=lambda *at: bar(*at[1:], at[0]),
            keep=lambda known: write_text(partial, known.to_json()),
        )  # fmt: skip
    write_text(output, found.to_json())
    partial.unlink(missing_ok=True)
    screen.data(found.model_dump(mode="json"))
    screen.show(show.layer_table(found))
    for line in show.summary_lines(found):
        screen.show(line)
    screen.note(f"wrote {output}")
    budget = show.suggested_budget(found)
    asked = f"--weights auto --sensitivity {shown(output)} --max-error {budget:.2g} -o plan.json"
    screen.next_step(f"llamaplan solve {shown(model)} {asked}")


MAX_TEXT_BYTES = 64 << 20


def known_part(path: Path, subject: "SensitivitySubject", screen: Output) -> "PartialSensitivity":
    """Return what an interrupted run of the same measurement found, or the beginning of a new one."""
    from plans.sensitivity import MAX_BYTES, PartialSensitivity

    if path.exists():
        try:
            found = PartialSensitivity.read(path, max_bytes=MAX_BYTES)
        except InputError as error:
            screen.note(f"measuring from the beginning: {error.line()}")
        else:
            if found.subject == subject:
                screen.note(f"{len(found.int4)} of {subject.num_hidden_layers} layers were measured before")
                return found
            screen.note(f"measuring from the beginning: {path} is of another model, text or number of tokens")
    return PartialSensitivity(subject=subject)


def solve_widths(
    question: "Question",
    asked: ask.Asked,
    widths: options.AnyWeightOptions,
    effort: "Effort",
    *,
    solve_one: "Solve",
    screen: Output,
) -> "tuple[Plan, LadderAnswer | None]":
    """Answer a question in the width, or the mix of widths, that was asked for.

    Raises:
        UsageError: --weights auto and --sensitivity without --max-error.
        IntegrityError: the sensitivities are another model's.
        InfeasibleError: as `solve_one`; or nothing within the error fits.
    """
    if widths.sensitivity is None:
        chosen = widest(question, asked, screen) if widths.weights == "auto" else question
        with screen.spinner(f"solving for {len(question.cluster.devices)} devices"):
            return solve_one(chosen, effort), None
    from plans.sensitivity import read_sensitivity

    known = read_sensitivity(widths.sensitivity, asked.profile)
    if widths.weights != "auto":
        with screen.spinner(f"solving for {len(question.cluster.devices)} devices"):
            return solve_one(with_error(question, known), effort), None
    return climbed(question, known, widths, effort, solve_one=solve_one, screen=screen, asked=asked)


def climbed(
    question: "Question",
    known: "Sensitivity",
    widths: options.AnyWeightOptions,
    effort: "Effort",
    *,
    asked: ask.Asked,
    solve_one: "Solve",
    screen: Output,
) -> "tuple[Plan, LadderAnswer]":
    """Return the best of the ladder; errors as `solve_widths`."""
    from planner.answers.ladder import Ladder, best_of_ladder

    if widths.max_error is None:
        raise UsageError(
            "--sensitivity with --weights auto needs --max-error",
            expected=f"a mean KL per token; int8 costs {known.int8:.3g} here, int4 {sum(known.int4):.4g}",
        )
    ladder = Ladder(question, known, budget=widths.max_error)
    what = f"solving the ladder for {len(question.cluster.devices)} devices"
    with screen.progress(what, unit="items") as bar:
        found = best_of_ladder(ladder, effort, solve_one=solve_one, progress=bar)
    ask.warn_of_unpacked(asked.checkpoint, found.best.weights, screen)
    return found.best, found


def with_error(question: "Question", known: "Sensitivity") -> "Question":
    """Return the question with what its widths are expected to cost."""
    from planner.model.widths import Packed
    from plans.packed.choice import WeightError

    assert question.weights is not None, "options.AnyWeightOptions.check"
    error = WeightError(expected=known.expected(question.weights), sensitivity_sha256=known.sha256)
    choice = question.weights.model_copy(update={"error": error})
    return question.packed(Packed(choice, question.profile))


def widest(question: "Question", asked: ask.Asked, screen: Output) -> "Question":
    """Return the question in the widest of its widths that fits, and say which that is."""
    from planner.answers.widest import widest_that_fits

    found = widest_that_fits(question)
    if found.weights is not None:
        screen.note(f"{found.weights.kind} is the widest in which the model fits")
    ask.warn_of_unpacked(asked.checkpoint, found.weights, screen)
    return found
