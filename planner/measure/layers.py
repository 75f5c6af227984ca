"""Time real decoder layers on the devices of this machine, with the chain that `llamarun` runs.

A short chain (`planner.measure.chain`) makes the same steps as a real run, and its stage clock says what each part
took.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median, median_low
from typing import Any

import torch

from planner.measure.calm import MOST_OTHER_CORES, WINDOW_SECONDS, CalmMeter
from planner.measure.chain import WEIGHT_SCALE, PathName, short_chain
from planner.measure.points import Points
from plans.checkpoint.units import Checkpoint
from plans.cluster import Timings
from plans.profile import ModelProfile, PackedName
from runtime.engine.run import BareChain, generate_requests
from runtime.fast.products import packed_layers
from runtime.generate.clock import stage_clock
from runtime.generate.limits import Limits
from runtime.generate.request import Request
from runtime.generate.sampling import Sampling
from runtime.reading.capacity import memory_faults
from runtime.reading.devices import synchronize, torch_device
from runtime.stage_time import StageTime, StepTrace, since
from runtime.stages.chain import Chain
from runtime.steps.parts import TOKEN, Part, opening_of
from runtime.steps.runner import StageRunner
from runtime.steps.units import ChainUnits

COPY_BYTES = (4096, 64 << 20)
COPY_REPEATS = 9

Progress = Callable[[], None]
"""Called after every visit of a point."""
Point = tuple[int, ...]
Visit = Callable[["Samples", "Samples"], None]

ROUNDS = 3
"""Every point is visited this often, far apart in time; the least of the visits counts, as nothing but the machine's
other work makes a visit longer."""
REPEATS = 3
"""A visit is the median of so many decode steps, or prompts."""
PROMPT_SECONDS = 0.1
"""A visit begins no further prompt after this."""
AGREEMENT = 1.03
"""Two visits of a prompt that are this close need no third; prompts take most of the time."""
LAYERS, HEAD_STAGE = 1, 2
"""Places in the chain: the embedding is stage 0."""


@dataclass(slots=True)
class Samples:
    """What was measured so far: seconds by point, one number for each visit."""

    decode: dict[Point, list[float]] = field(default_factory=dict)
    """By (context, batch)."""
    prefill: dict[Point, list[float]] = field(default_factory=dict)
    """By (tokens, past tokens, batch)."""
    embedding: dict[Point, list[float]] = field(default_factory=dict)
    """By (positions,); everything of a step that is neither layers nor head."""
    head: dict[Point, list[float]] = field(default_factory=dict)
    """By (batch,)."""

    def tables(self) -> tuple[dict[Point, list[float]], ...]:
        """Return all tables, in one order."""
        return (self.decode, self.prefill, self.embedding, self.head)

    def take(self, other: "Samples") -> None:
        """Add what another object holds."""
        for mine, theirs in zip(self.tables(), other.tables(), strict=True):
            for point, seconds in theirs.items():
                mine.setdefault(point, []).extend(seconds)


@dataclass(frozen=True, slots=True)
class Measured:
    """Curves of one device, and how much other programs disturbed them."""

    timings: tuple[Timings, ...]
    """Those of the layers first; embedding and head are apart where they are stored otherwise."""
    is_disturbed: bool
    """Whether some point was only ever timed while other programs were at work."""


def measure_device(
    checkpoint: Checkpoint,
    profile: ModelProfile,
    *,
    device: str,
    points: Points,
    path: PathName = "reference",
    progress: Progress = lambda: None,
) -> Measured | None:
    """Time the shape on one device of this machine.

    Every point is visited several times, far apart, and the least visit counts.

    Args:
        checkpoint: what `profile` was made from, or a stand-in (`planner.measure.stand_in`).
        profile: sizes and dtype; all layers are stored in one way.
        device: a device of this machine, as a plan names it.
        points: from `planner.measure.points.choose_points`.
        path: which path to time.
        progress: called `num_visits(points)` times.

    Returns:
        None if `path` is fast and no native code would serve any step here.

    Raises:
        MachineError: memory ran out, or the device is not here.
        InputError: the runtime does not run this family.
    """
    chain, reader = (
        short_chain(checkpoint, num_layers=num_layers, dtype=profile.dtype, device=device, path=path)
        for num_layers in (points.num_layers, points.num_prefill_layers)
    )
    if path == "fast" and not _is_native(chain):
        return None
    calm, disturbed = Samples(), Samples()
    with memory_faults("timing layers"):
        _visit_steps(chain, points.decode[0][0], 1, calm, Samples())  # not kept: the first steps warm up
        _visit_prefill(reader, points.prefill[0], calm, Samples())
        for _ in range(ROUNDS):
            _visit_all(_visits(chain, reader, points), calm, disturbed, progress)
    return _result(calm, disturbed, chain, profile, path=path)


def _is_native(chain: Chain) -> bool:
    """Whether kernels serve, or packed layers inside of transformers' code are multiplied natively."""
    return chain.fast is not None or any(layer.product is not None for layer in packed_layers([chain]))


def _visit_all(visits: Iterable[Visit], calm: Samples, disturbed: Samples, progress: Progress) -> None:
    meter, window = CalmMeter(), Samples()
    for visit in visits:
        visit(calm, window)
        progress()
        if meter.seconds >= WINDOW_SECONDS:
            (calm if meter.other_cores() <= MOST_OTHER_CORES else disturbed).take(window)
            window = Samples()
    (calm if meter.other_cores() <= MOST_OTHER_CORES else disturbed).take(window)


def num_visits(points: Points) -> int:
    """Return how many times `measure_device` calls its `progress`."""
    return ROUNDS * (len(points.batches) + len(points.decode) + len(points.prefill))


def cpu_threads(num_threads: int | None) -> int:
    """Set the threads torch computes with, unless None, and return their number."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def _visits(chain: Chain, reader: Chain, points: Points) -> Iterator[Visit]:
    """Yield what one round does; each visit gets what is known already, and where to put what it finds."""
    for batch in points.batches:
        yield partial(_visit_steps, chain, points.decode[0][0], batch)
    for context, size in points.decode:
        yield partial(_visit_decode, chain, context, size)
    for point in points.prefill:
        yield partial(_visit_prefill, reader, point)


def _visit_steps(chain: Chain, context: int, batch: int, _known: Samples, found: Samples) -> None:
    """Make whole steps, choice of the token included: what is neither layers nor head is paid once per step."""
    request = _request(context, new_tokens=REPEATS + 2)
    traces: list[StepTrace] = []
    run = generate_requests(BareChain(chain), [request] * batch, on_step=traces.append, measure_stages=True)
    steps = list(zip(run.step_seconds, traces[1:], strict=True))[1:]
    _add_visit(found.head, (batch,), [trace.stages[HEAD_STAGE].compute_seconds for _seconds, trace in steps])
    _add_visit(found.embedding, (batch,), [_rest(seconds, trace.stages) for seconds, trace in steps])


def _visit_decode(chain: Chain, context: int, batch: int, _known: Samples, found: Samples) -> None:
    past = max(context - 1 - REPEATS // 2, 0)
    runner = _filled_runner(chain, past=past, batch=batch, prompt_tokens=past, tokens=REPEATS + 1)
    seconds: list[float] = []
    with stage_clock(chain) as totals:
        for step in range(REPEATS + 1):
            before = [total.copy() for total in totals]
            runner.run([Part(row, past + step, 1, TOKEN) for row in range(batch)], torch.ones(batch, dtype=torch.int64))
            seconds.append(_layer_seconds(chain, since(totals, before)))
    _add_visit(found.decode, (context, batch), seconds[1:])  # the first step meets a cache that was just made


def _visit_prefill(chain: Chain, point: tuple[int, int, int], known: Samples, found: Samples) -> None:
    if _is_settled(known.prefill.get(point, ())):
        return
    tokens, _past, batch = point
    started, layers, rests = time.perf_counter(), list[float](), list[float]()
    while not layers or (len(layers) < REPEATS and time.perf_counter() - started < PROMPT_SECONDS):
        seconds, stages = _read_prompt(chain, point)
        layers.append(_layer_seconds(chain, stages))
        rests.append(_rest(seconds, stages))
    _add_visit(found.prefill, point, layers)
    _add_visit(found.embedding, (tokens * batch,), rests)


def _read_prompt(chain: Chain, point: tuple[int, int, int]) -> tuple[float, Sequence[StageTime]]:
    """Return the seconds a prompt took, and those of every stage."""
    tokens, past, batch = point
    runner = _filled_runner(chain, past=past, batch=batch, prompt_tokens=past + tokens, tokens=tokens)
    with stage_clock(chain) as totals:
        synchronize(chain.stage_devices[0])
        started = time.perf_counter()
        for row in range(batch):  # each alone, as they are read
            runner.run([Part(row, past, tokens, TOKEN)], torch.ones(tokens, dtype=torch.int64))
        return time.perf_counter() - started, totals


def _rest(seconds: float, stages: Sequence[StageTime]) -> float:
    """What of a step was spent neither in the layers nor in the head."""
    return seconds - stages[HEAD_STAGE].compute_seconds - stages[LAYERS].compute_seconds


def _add_visit(table: dict[Point, list[float]], point: Point, repeats: Sequence[float]) -> None:
    table.setdefault(point, []).append(median_low(repeats))


def _request(prompt_tokens: int, *, new_tokens: int) -> Request:
    limits = Limits(context_tokens=prompt_tokens + new_tokens, max_tokens=new_tokens)
    return Request(prompt_ids=[1] * prompt_tokens, sampling=Sampling(), limits=limits)


def _is_settled(seconds: Sequence[float]) -> bool:
    return len(seconds) > 1 and max(seconds) <= AGREEMENT * min(seconds)


def _layer_seconds(chain: Chain, stages: Sequence[StageTime]) -> float:
    return stages[LAYERS].compute_seconds / chain.stages[LAYERS].num_layers


def _filled_runner(chain: Chain, *, past: int, batch: int, prompt_tokens: int, tokens: int) -> StageRunner:
    """Return what runs steps of `batch` sequences with `past` tokens in their caches; the values do not matter."""
    runner, request = StageRunner(ChainUnits(chain), number=0), _request(prompt_tokens, new_tokens=tokens)
    config, device = chain.config, chain.stage_devices[LAYERS]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, past, head_dim)
    runner.make_slots(num_slots=batch, capacity=past + tokens + 1)
    for row in range(batch):
        total = past + tokens + 1
        runner.open(
            opening_of(
                request,
                sequence=row,
                slot=row,
                keeps_tokens=past,
                num_tokens=total,
                num_slots=batch,
                capacity=total,
            )
        )
        for layer in range(chain.stages[LAYERS].num_layers if past else 0):
            states = torch.full(shape, WEIGHT_SCALE, dtype=chain.dtype, device=device)
            runner.slots[row].update(states, states.clone(), layer)
    return runner


def _result(calm: Samples, disturbed: Samples, chain: Chain, profile: ModelProfile, *, path: PathName) -> Measured:
    pairs = zip(calm.tables(), disturbed.tables(), strict=True)
    is_disturbed = any(point not in best for best, other in pairs for point in other)
    calm.take(disturbed)
    decode, prefill, embedding, head = map(_rows, calm.tables())
    tables: dict[PackedName | None, dict[str, Any]] = {}
    for unit, name, rows in (
        (profile.layers[0], "decode_seconds_per_layer", decode),
        (profile.layers[0], "prefill_seconds_per_layer", prefill),
        (profile.embedding, "embedding_seconds", embedding),
        (profile.head, "head_seconds", head),
    ):
        tables.setdefault(unit.weights, {})[name] = rows
    threads = torch.get_num_threads() if chain.stage_devices[0].type == "cpu" else 0
    shape = profile.layers[0].shapes_sha256
    timings = (
        Timings(profile=shape, dtype=profile.dtype, weights=weights, path=path, threads=threads, **found)
        for weights, found in tables.items()
    )
    return Measured(tuple(timings), is_disturbed)


def _rows(table: dict[Point, list[float]]) -> tuple[Any, ...]:
    return tuple((*point, max(0.0, min(visits))) for point, visits in sorted(table.items()))


def measure_copy(from_device: str, to_device: str) -> tuple[float, float]:
    """Return (latency in seconds, bytes per second) of copies from one device of this machine to another."""
    source, target = torch_device(from_device), torch_device(to_device)
    small, large = (_copy_seconds(size, source, target) for size in COPY_BYTES)
    bandwidth = (COPY_BYTES[1] - COPY_BYTES[0]) / max(large - small, 1e-9)
    return max(0.0, small - COPY_BYTES[0] / bandwidth), bandwidth


def _copy_seconds(num_bytes: int, source: torch.device, target: torch.device) -> float:
    values = torch.zeros(num_bytes, dtype=torch.uint8, device=source)
    seconds = []
    for _ in range(COPY_REPEATS + 1):
        synchronize(source)
        synchronize(target)
        started = time.perf_counter()
        values.to(target)
        synchronize(target)
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])
