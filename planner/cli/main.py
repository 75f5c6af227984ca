"""`llamaplan`: the planner's command line. Commands parse, call and print; heavy imports happen when one runs."""

from typing import NoReturn

from planner.cli import ask, options
from planner.cli import compare as cli_compare
from planner.cli import devices as cli_devices
from planner.cli import export as cli_export
from planner.cli import links as cli_links
from planner.cli import simulate as cli_simulate
from planner.cli import solve as cli_solve
from planner.cli import weights as cli_weights
from planner.cli.frontier import frontier_command
from planner.cli.next_steps import shown
from plans.commands.app import new_app
from plans.commands.console import leave, run_command
from plans.commands.option_groups import ScreenOptions, with_option_groups

app = new_app("llamaplan", summary="Plan how a Llama-family model is cut over the devices you own, and export the cut.")


def main() -> NoReturn:
    """Entry point of the command `llamaplan`."""
    leave(run())


def run() -> int:
    """Run the command line in `sys.argv`; returns the exit code."""
    return run_command(app, name="llamaplan")


@app.command()
@with_option_groups
def analyze(
    model: options.ModelArgument,
    *,
    ctx_size: options.ContextOption = None,
    batch_size: options.BatchOption = 1,
    dtype: options.DtypeOption = None,
    kv_cache_dtype: options.KvDtypeOption = None,
    widths: options.WeightOptions,
    output: options.OutputOption = None,
    printed: ScreenOptions,
) -> None:
    """Say what every layer of a model costs, without loading weights.

    Example: llamaplan analyze my-model/ --ctx-size 8192 -o profile.json
    """
    from planner.model.find import find_model
    from planner.model.workloads import context_warnings, make_workload, parse_dtype
    from planner.show.profile import as_json as to_json
    from planner.show.profile import headline, summary_lines, unit_table
    from plans.checkpoint.folder import open_checkpoint
    from plans.reading.files import write_text

    screen = printed.output()
    chosen, kv_chosen = parse_dtype(dtype), parse_dtype(kv_cache_dtype, option="--kv-cache-dtype")
    checkpoint = open_checkpoint(find_model(model))
    sized = ask.read_widths(checkpoint, widths, dtype=chosen, kv_cache_dtype=kv_chosen)
    profile = sized.profile
    workload = make_workload(profile, ctx_size=ctx_size, batch_size=batch_size)
    warnings = checkpoint.warnings + context_warnings(profile, workload)
    for warning in warnings:
        screen.warn(warning)
    ask.warn_of_unpacked(checkpoint, sized.choice, screen)
    if output is not None:
        ask.refuse_inside(output, checkpoint.directory)
        write_text(output, profile.to_json())
        screen.note(f"wrote {output}")
    screen.data(to_json(profile, workload, warnings))
    screen.show(headline(profile))
    screen.show(unit_table(profile, workload))
    for line in summary_lines(profile, workload):
        screen.show(line)
    packed = f" --weights {widths.weights}" if widths.weights else ""
    screen.next_step(f"llamaplan solve {shown(model)}{packed} -o plan.json")


cli_devices.register(app)
cli_links.register(app)
cli_solve.register(app)
cli_weights.register(app)
app.command("frontier")(frontier_command)
cli_compare.register(app)
cli_simulate.register(app)
cli_export.register(app)
