"""What a worker does: load its stage, then receive, compute and send until the driver says that it is over."""

import queue
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import torch

from plans.errors import LlamaplanError
from runtime.distributed.clocks import StageClock
from runtime.distributed.control.control import Control
from runtime.distributed.control.messages import Broken, Failed, Form, Formed, Identity, Job, Linked, Ready
from runtime.distributed.header import CLOSE, DTYPE_CODES, STEP, TOKENS, Header, Stamp, check_against, dtype_code
from runtime.distributed.links import MAX_WAITING_MESSAGES, Arrival, Links, Place
from runtime.distributed.loading import LoadedStage, LoadSettings, load_stage, share_threads
from runtime.reading.capacity import memory_faults
from runtime.reading.opening import Source
from runtime.stage_time import FAST_PATH
from runtime.stages.traffic import stage_read_bytes
from runtime.steps.parts import Part
from runtime.steps.runner import StageRunner
from runtime.steps.units import StageUnits


class Worker:
    """One stage at work.

    Args:
        control: the connection to the driver.
        loaded: the stage.
        identity: of the run.
        address: of this machine for data connections.
        traces: whether every step is kept for a trace.
    """

    def __init__(
        self, control: Control, loaded: LoadedStage, *, identity: Identity, address: str, traces: bool
    ) -> None:
        self._control, self._identity, self._address = control, identity, address
        self._rank = loaded.number
        self._runner = StageRunner(StageUnits(loaded.stage), number=loaded.number)
        self._device, self._dtype = loaded.stage.device, dtype_code(loaded.stage.model.dtype)
        self._hidden_size, self._num_steps = loaded.hidden_size, 0
        self._clock = StageClock(traces=traces, is_fast=loaded.stage.path == FAST_PATH)
        self._links: Links | None = None
        control.answer_with(self._clock.take)
        control.count_with(lambda: None if self._links is None else self._links.counts())

    @property
    def _is_last(self) -> bool:
        return self._rank == self._identity.num_stages - 1

    def run(self) -> NoReturn:
        """Serve one epoch after the other; the control connection's threads end the process."""
        epoch = 0
        while True:
            form = self._control.wait_for_form(newer_than=epoch)
            epoch = form.epoch
            self._runner.clear()
            self._num_steps = 0
            inbox: queue.Queue[Arrival] = queue.Queue(MAX_WAITING_MESSAGES)
            links = self._links = self._connect(form, inbox)
            self._control.say(Formed(epoch=epoch))
            while self._control.form is form:
                try:
                    arrival = inbox.get(timeout=0.2)
                except queue.Empty:
                    continue
                self._step(arrival, links)
            links.close()

    def _connect(self, form: Form, inbox: "queue.Queue[Arrival]") -> Links:
        place = Place(
            rank=self._rank,
            num_ranks=self._identity.num_stages,
            address=self._address,
            device=self._device,
            uses_nccl=form.uses_nccl,
        )
        return Links(
            place,
            self._control.store,
            stamp=Stamp.of(self._identity.model_id, epoch=form.epoch),
            on_linked=lambda link: self._control.say(Linked(epoch=form.epoch, link=link)),
            expect=self._expect,
            inbox=inbox,
            report=lambda peer, error: self._report(form, peer, error),
        )

    def _expect(self, header: Header, parts: Sequence[Part]) -> None:
        """Check that a step is the next one; its sequences may have been opened on the control connection just now."""
        if header.kind == CLOSE:
            self._control.drop_opening(header.step)
            return
        check_against(
            header, kind=STEP, sender=self._rank - 1, step=self._num_steps, width=self._hidden_size, dtype=self._dtype
        )
        self._num_steps += 1
        for part in parts:
            if not self._runner.has(part.sequence):
                opening = self._control.take_opening(part.sequence)
                if opening is not None:
                    self._runner.open(opening)

    def _report(self, form: Form, peer: int, error: Exception) -> None:
        if isinstance(error, LlamaplanError):
            self._control.say(Failed(exit_code=error.exit_code, code=error.code, line=error.line()))
        elif self._control.form is form:
            self._control.say(Broken(epoch=form.epoch, peer=peer, text=str(error).splitlines()[0][:1000]))

    def _step(self, arrival: Arrival, links: Links) -> None:
        header, parts = replace(arrival.header, sender=self._rank), arrival.parts
        if header.kind == CLOSE:
            self._runner.close(header.step, slot=header.rows, keeps=bool(header.width))
            if not self._is_last:
                links.send(header, parts, arrival.payload)
            return
        with (
            memory_faults(f"running stage {self._rank}"),
            self._clock.step(
                sequence=parts[0].sequence,
                step=header.step,
                is_prefill=self._runner.is_prefill(parts),
                hop_seconds=arrival.transfer_seconds,
            ),
        ):
            checked, outputs = self._runner.run(parts, arrival.payload)
        if self._is_last:
            rows, width = outputs.shape
            header = replace(header, kind=TOKENS, rows=rows, width=width, dtype=DTYPE_CODES["int64"])
        links.send(header, checked, outputs)


def work(
    control: Control, source: Source, *, rank: int, job: Job, device: str | None, identity: Identity, address: str
) -> NoReturn:
    """Load the stage and serve it; errors go to the driver.

    Args:
        control: the connection to the driver.
        source: what this process was given.
        rank: its place in the chain.
        job: what the driver wants.
        device: where the stage goes, if this host decides it.
        identity: of the run.
        address: of this machine for data connections.
    """
    try:
        settings = LoadSettings(
            dtype=job.dtype,
            kv_cache_dtype=job.kv_cache_dtype,
            device=device or job.device,
            verifies=job.verifies,
            cache_tokens=job.cache_tokens,
            batch_size=job.batch_size,
            speed=job.speed,
        )
        share_threads(job.threads or torch.get_num_threads(), num_processes=1)
        loaded = load_stage(source, rank, settings, progress=control.progress)
        worker = Worker(control, loaded, identity=identity, address=address, traces=job.traces)
        control.say(
            Ready(
                device=str(loaded.stage.device),
                load_seconds=loaded.load_seconds,
                decode_read_bytes=stage_read_bytes(loaded.stage, batch_size=1),
            )
        )
        worker.run()
    except Exception as error:  # whatever it is, the driver has to hear of it
        control.fail(error)
