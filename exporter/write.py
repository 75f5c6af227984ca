"""Plan + checkpoint -> export: the orchestration. Bytes are copied or rounded, hashed and flushed."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from exporter.binding import Say, bind, choose_dtype
from exporter.disk.staging import Staging
from exporter.disk.target import Target
from exporter.foreign.opening import open_origin
from exporter.foreign.origin import Origin
from exporter.job import Job, Progress, start_workers
from exporter.layout import Layout, lay_out, scale_dtype
from exporter.packers import Packing, calibration_text
from exporter.packing.nearest import MAX_THREADS, slow_words
from exporter.packing.packable import check_packable, unpacked_lines
from exporter.root_files import RootFiles, collect
from exporter.sources import Sources
from plans.errors import UsageError
from plans.export.manifest import CalibrationText, Manifest
from plans.plan import Plan
from plans.reading.files import sha256_hex
from plans.reading.strict import dump_json


def _ignore(*_: object) -> None:
    """Take no notice of a warning or of progress."""


def export(
    plan: Plan,
    *,
    model: Path | Origin,
    output: Path,
    dtype: str | None = None,
    stages: Collection[int] | None = None,
    force: bool = False,
    calibrate_on: Path | None = None,
    threads: int | None = None,
    progress: Progress = _ignore,
    calibrating: Progress = _ignore,
    warn: Say = _ignore,
    note: Say = _ignore,
) -> Manifest:
    """Write the export of `plan`: one safetensors file per stage in a folder that is itself a checkpoint.

    Args:
        plan: a plan made for this model.
        model: the checkpoint folder, or what `open_origin` made of it. A plan of a GGUF file's own bytes has to be cut
            again for what the file becomes (`planner.answers.recut`).
        output: the folder to write; it appears when everything is in it, or not at all.
        dtype: bf16, fp16 or fp32 to convert floating-point weights; None keeps the plan's dtype.
        stages: zero-based stages to write (what one host needs); None for all. The export id is the same.
        force: replace what is at `output`; the old content is kept until the new one is complete.
        calibrate_on: UTF-8 text to calibrate packed layers on; None rounds them to nearest.
        threads: how many round weights that the plan wants packed, None for one per processor; the bytes are the same.
        progress: called now and then with (bytes done, bytes in all).
        calibrating: called after every layer that was calibrated with (layers done, layers in all).
        warn: called with one sentence per thing that may be wrong.
        note: called with one sentence per thing worth knowing.

    Returns:
        The manifest that was written.

    Raises:
        UsageError: `output` overlaps `model`, or an argument is not possible.
        InputError: the checkpoint or the plan is malformed.
        IntegrityError: the plan is for another model, or the checkpoint changed meanwhile.
        MachineError: no space, no permission, or something is at `output`.

    Example:
        >>> from plans import read_plan
        >>> export(read_plan(Path("plan.json")), model=Path("my-model"), output=Path("shards"))  # doctest: +SKIP
    """
    origin = open_origin(model) if isinstance(model, Path) else model
    checkpoint = origin.checkpoint
    bound = bind(plan, checkpoint=checkpoint, warn=warn)
    target_dtype = choose_dtype(dtype, plan=bound, checkpoint=checkpoint, warn=warn)
    if bound.weights is not None:
        check_packable(bound.weights, checkpoint=checkpoint, dtype=target_dtype or bound.profile.dtype)
    layout = lay_out(bound, checkpoint=checkpoint, dtype=target_dtype)
    chosen = _chosen(stages, layout)
    for line in _packing_lines(bound, layout):
        note(line)
    root = collect(origin, layout=layout, plan=bound)
    for line in root.warnings:
        warn(line)
    packing = Packing(
        checkpoint,
        layout,
        scale=scale_dtype(bound, target_dtype),
        text=calibration_text(calibrate_on, choice=bound.weights, checkpoint=checkpoint, warn=warn),
        num_threads=min(threads or len(os.sched_getaffinity(0)), MAX_THREADS),
        progress=calibrating,
    )
    with Target.open(output, sources=origin.paths) as target, Sources.of_origin(origin) as sources:
        key = job_key(bound, layout=layout, root=root, sources=sources, text=packing.record)
        with (
            Staging.begin(target, key=key, force=force, warn=warn) as staging,
            start_workers(packing.num_threads) as workers,
            packing.packer(staging, sources, workers) as packer,
        ):
            job = Job(layout, chosen, sources, staging, workers, packer, packing.record, progress, warn, note)
            manifest = job.run(bound, checkpoint=checkpoint, root=root)
            staging.publish(force=force)
    if layout.has_copied_head:
        note("the tied embedding table is in the first file and, as lm_head.weight, in the last")
    if origin.errors.words:
        note(origin.errors.words)
    return manifest


def _packing_lines(plan: Plan, layout: Layout) -> Iterator[str]:
    """Yield what is worth knowing before weights are packed; errors as `unpacked_lines`."""
    if plan.weights is None:
        return
    yield from unpacked_lines(plan.weights, layout=layout)
    slow = slow_words()  # asked before there are threads: compiling happens once
    if slow is not None:
        yield slow


def _chosen(stages: Collection[int] | None, layout: Layout) -> frozenset[int]:
    everything = frozenset(range(len(layout.stages)))
    chosen = everything if stages is None else frozenset(stages)
    if not chosen or chosen - everything:
        wrong = min(chosen - everything, default=None)
        raise UsageError(
            f"there is no stage {wrong}" if chosen else "no stage was chosen", expected=f"0 to {len(everything) - 1}"
        )
    return chosen


def job_key(
    plan: Plan, *, layout: Layout, root: RootFiles, sources: Sources, text: CalibrationText | None = None
) -> str:
    """Return a hash over everything that the exported bytes depend on; a resumed run must have the same."""
    states = {name: [s.device, s.inode, s.size, s.modified_ns, s.changed_ns] for name, s in sources.states.items()}
    headers = [sha256_hex(stage.header) for stage in layout.stages]
    small = {name: sha256_hex(data) for name, data in root.contents.items()}
    known = {"plan": plan.sha256, "states": states, "headers": headers, "small": small}
    if text is not None:
        known["text"] = text.model_dump(mode="json")
    return sha256_hex(dump_json(known).encode())
