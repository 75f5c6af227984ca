"""A session whose stages run in processes of their own; it stands where a `runtime.session.Session` would."""

import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from plans.errors import LlamaplanError
from runtime.distributed.clocks import StageClock
from runtime.distributed.control.address import Address
from runtime.distributed.control.faults import Loss
from runtime.distributed.control.identity import identity_of
from runtime.distributed.control.launch import LocalWorkers
from runtime.distributed.control.members import describe, exit_code_of
from runtime.distributed.control.messages import Numbers
from runtime.distributed.control.silence import Patience
from runtime.distributed.control.team import Team
from runtime.distributed.header import Stamp
from runtime.distributed.links import Links, Place
from runtime.distributed.loading import LoadedStage
from runtime.distributed.pipeline import Pipeline
from runtime.prepared import Prepared
from runtime.reading.capacity import peak_memory_bytes
from runtime.reading.opening import Source
from runtime.stage_time import FAST_PATH, StageTime, StageTimes, StageView
from runtime.stages.traffic import stage_read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSettings:
    """How the processes are started and kept together.

    Attributes:
        workers: the workers of this machine, one per further stage; None waits for others to join.
        listen: where workers from elsewhere join.
        key: what they must prove.
        patience: how long to wait for what.
        threads: CPU threads per process; None shares this machine's cores out.
        speed: `reference`, `auto` or `max`: whether decode steps use the native kernels.
        traces: whether every step is kept for a trace.
        num_restarts: how many lost workers may be started again.
        note: told what a person needs to know.
    """

    workers: LocalWorkers | None = None
    listen: Address | None = None
    key: bytes = b""
    patience: Patience = field(default_factory=Patience)
    threads: int | None = None
    speed: str = "reference"
    traces: bool = False
    num_restarts: int = 0
    note: Callable[[str], None] = lambda _text: None


class ProcessSession:
    """The driver: this process computes the first stage and leads the others. Use it as a context manager.

    Made by `open_processes`.

    Attributes:
        prepared: what was known before loading.
        load_seconds: how long it took until every stage was ready.
    """

    def __init__(self, prepared: Prepared, team: Team, loaded: LoadedStage, settings: ProcessSettings) -> None:
        self.prepared = prepared
        self.load_seconds = 0.0
        self._worker_peaks: list[int] = []
        self._team, self._loaded, self._settings = team, loaded, settings
        self._clock = StageClock(traces=settings.traces, is_fast=loaded.stage.path == FAST_PATH)
        self._pipeline = Pipeline(
            team,
            loaded.stage,
            self._clock,
            recover=self._recover,
            stages=prepared.source.stages,
            can_be_cut=not any(window is not None for window in prepared.source.checkpoint.config.sliding_windows),
        )

    @property
    def source(self) -> Source:
        """What it was loaded from."""
        return self.prepared.source

    @property
    def dtype_name(self) -> str:
        """The dtype it computes in, as torch spells it."""
        return str(self._loaded.stage.model.dtype).removeprefix("torch.")

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory each process has used, added up, when they were last asked."""
        return peak_memory_bytes() + sum(self._worker_peaks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """End every process, in order or because of an error."""
        if error is None and self._team.faults.fault is None:
            self._team.finish()
        else:
            self._team.abort(exit_code=exit_code_of(error), line=f"the driver ended the run: {describe(error)}")
        if self._pipeline.links is not None:
            self._pipeline.links.close()

    def stage_views(self, *, batch_size: int) -> tuple[StageView, ...]:
        """Return what each stage is, and the bytes it reads in a decode step."""
        here = stage_read_bytes(self._loaded.stage, batch_size=batch_size)
        ready = [member.ready for _, member in sorted(self._team.members.items()) if member.ready is not None]
        devices = [str(self._loaded.stage.device), *(r.device for r in ready)]
        read = [here, *(r.decode_read_bytes for r in ready)]
        return tuple(StageView(*entry) for entry in zip(self.source.stages, devices, read, strict=True))

    def connect(self) -> None:
        """Form the data plane; every stage is loaded."""
        uses_nccl = self._uses_nccl()
        epoch = self._team.form(uses_nccl=uses_nccl)
        place = Place(
            rank=0,
            num_ranks=len(self.source.stages),
            address=self._address(),
            device=self._loaded.stage.device,
            uses_nccl=uses_nccl,
        )
        links = self._pipeline.links = self._links(place, epoch=epoch)
        self._team.count_links = links.counts
        self._team.wait_until_formed()

    def _links(self, place: Place, *, epoch: int) -> Links:
        """Connect to both neighbours; in a thread, since nothing interrupts gloo while it waits for them."""
        made: queue.Queue[Links | Exception] = queue.Queue()

        def connect() -> None:
            try:
                made.put(
                    Links(
                        place,
                        self._team.store,
                        stamp=Stamp.of(identity_of(self.source).model_id, epoch=epoch),
                        on_linked=lambda link: self._team.links.linked(0, link, epoch=epoch),
                        expect=self._pipeline.expect,
                        inbox=self._team.faults.events,
                        report=self._report,
                    )
                )
            except Exception as error:  # it belongs to whoever waits
                made.put(error)

        threading.Thread(target=connect, daemon=True, name="connect").start()
        self._team.wait_until(lambda: not made.empty())
        links = made.get()
        if isinstance(links, Exception):
            raise links
        return links

    def new_steps(self) -> Pipeline:
        """Return what computes the steps of an engine."""
        return self._pipeline

    @contextmanager
    def watch_stages(self) -> Iterator["ProcessWatch"]:
        """Measure what the stages do inside the block."""
        yield ProcessWatch(self.take_numbers)

    def take_numbers(self) -> list[Numbers]:
        """Return what every stage has measured since the last time, in chain order."""
        workers = self._team.numbers()
        self._worker_peaks = [numbers.peak_memory_bytes for numbers in workers]
        return [self._clock.take(), *workers]

    def read_bandwidth(self, *, repeats: int) -> dict[str, float]:  # noqa: ARG002 - the same call as in one process
        """Return nothing: reading weights is measured in one process only."""
        return {}

    def _uses_nccl(self) -> bool:
        members = self._team.members.values()
        places = [(m.join.host, m.ready.device) for m in members if m.join is not None and m.ready is not None]
        places.append((socket.gethostname(), str(self._loaded.stage.device)))
        return all(device.startswith("cuda") for _, device in places) and len(set(places)) == len(places)

    def _address(self) -> str:
        """The address of this machine at which the other stages reach it: the one they joined at."""
        channels = [member.channel for member in self._team.members.values()]
        return next((address for channel in channels if (address := channel.local_address())), "127.0.0.1")

    def _recover(self, loss: Loss) -> None:
        """Start a lost worker again, or wait until somebody does, and rebuild every cache.

        Raises:
            LlamaplanError: it could not be done.
        """
        self._settings.note(f"{loss.error.what}; starting it again")
        assert self._pipeline.links is not None
        self._pipeline.links.close()
        self._team.replace(loss.rank)
        if self._settings.workers is not None:
            self._team.adopt(loss.rank, *self._settings.workers.take(loss.rank))
        self._team.wait_until_loaded()
        self.connect()
        self._pipeline.start_over()

    def _report(self, peer: int, error: Exception) -> None:
        if isinstance(error, LlamaplanError):
            self._team.fail(error)
        else:
            self._team.suspect(0, peer, str(error).splitlines()[0])


class ProcessWatch:
    """What the stages of several processes spend; see `runtime.stage_time.StageWatch`.

    Args:
        take_numbers: asks every process what it has measured since the last time.
    """

    def __init__(self, take_numbers: Callable[[], Sequence[Numbers]]) -> None:
        self._take_numbers = take_numbers
        self._prefill: StageTimes = ()
        self._decode: StageTimes = ()
        take_numbers()

    def prompts_are_read(self) -> None:
        """Do nothing: every process tells prompts from decoding."""

    def take_step(self) -> StageTimes:
        """Return what each stage spent since this was last asked."""
        numbers = self._take_numbers()
        prefill, decode = _times(numbers, "prefill"), _times(numbers, "decode")
        self._prefill, self._decode = _sums(self._prefill, prefill), _sums(self._decode, decode)
        return _sums(prefill, decode)

    def phases(self) -> tuple[StageTimes, StageTimes]:
        """Return what each stage spent on prompts, and on decoding."""
        self.take_step()
        return self._prefill, self._decode


def _times(numbers: Sequence[Numbers], phase: str) -> StageTimes:
    return tuple(
        StageTime(
            getattr(n, f"{phase}_compute_seconds"),
            getattr(n, f"{phase}_hop_seconds"),
            num_fast_steps=n.decode_fast_steps if phase == "decode" else 0,
        )
        for n in numbers
    )


def _sums(first: StageTimes, second: StageTimes) -> StageTimes:
    if not first:
        return second
    return tuple(
        StageTime(
            a.compute_seconds + b.compute_seconds,
            a.hop_seconds + b.hop_seconds,
            num_fast_steps=a.num_fast_steps + b.num_fast_steps,
        )
        for a, b in zip(first, second, strict=True)
    )
