"""The driver's loop: keep several groups moving through the chain, so that no stage waits while there is work.

The first stage computes whatever is ready, oldest first; a group whose prompt is read in chunks goes to the end of the
queue after each chunk, so that others are not held up. Tokens never depend on the order: every group has its own
caches and its own random draws.
"""

import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch

from runtime.distributed.clocks import StageClock
from runtime.distributed.control.faults import Fault, Loss
from runtime.distributed.control.team import Team
from runtime.distributed.flow import Flow
from runtime.distributed.header import DTYPE_CODES, STEP, TOKENS, Header, check_against, closing
from runtime.distributed.links import Arrival, Links
from runtime.distributed.slots import StageRunner


class Pipeline:
    """Moves groups through the chain.

    Args:
        team: the other processes.
        runner: the first stage.
        clock: measures the first stage.
        recover: starts a lost worker again and connects everybody anew.
        num_stages: stages of the chain.
        hidden_size: width of hidden states.

    Attributes:
        links: connections to the neighbours; replaced after a restart.
    """

    def __init__(
        self,
        team: Team,
        runner: StageRunner,
        clock: StageClock,
        *,
        recover: Callable[[Loss], None],
        num_stages: int,
        hidden_size: int,
    ) -> None:
        self._recover = recover
        self._team, self._runner, self._clock = team, runner, clock
        self._last_rank = num_stages - 1
        self._hidden_size = hidden_size
        self._dtype = DTYPE_CODES[str(runner.stage.model.dtype).removeprefix("torch.")]
        self._active: dict[int, Flow] = {}
        self._ready: deque[Flow] = deque()
        self._next_group = 0
        self.links: Links | None = None

    def run(
        self,
        flows: Iterable[Flow],
        *,
        in_flight: int,
        on_step: Callable[[Flow], None] = lambda _flow: None,
        on_done: Callable[[Flow], None] = lambda _flow: None,
        keeps_caches: bool = False,
    ) -> None:
        """Run groups until all are finished.

        Args:
            flows: the groups; each is asked for when there is room for it.
            in_flight: groups under way at once.
            on_step: told when a group got tokens.
            on_done: told when a group is finished.
            keeps_caches: whether caches stay on the stages afterwards.

        Raises:
            LlamaplanError: the run cannot go on, or whatever `on_step` and `on_done` raise.
        """
        waiting = iter(flows)
        try:
            while self._start_more(waiting, on_done, in_flight=in_flight) or self._active:
                if self._ready:
                    self._send_step(self._ready.popleft())
                self._take_arrivals(on_step, on_done, keeps_caches=keeps_caches)
        except BaseException:
            self._abandon()
            raise

    def expect(self, header: Header) -> None:
        """Check a header of tokens; runs in the receiving thread.

        Raises:
            PeerError: not what must come next.
        """
        check_against(header, kind=TOKENS, sender=self._last_rank, columns=1, width=1, dtype=DTYPE_CODES["int64"])
        flow = self._active.get(header.group)
        if flow is not None:
            check_against(header, rows=len(flow.requests))

    def start_over(self) -> None:
        """Send everything again that the groups under way consist of, to stages that have forgotten it.

        The same steps over the same token ids give the same caches, and the same draws; tokens that come back a
        second time are only compared.
        """
        flows = list(self._active.values())
        self._active.clear()
        self._ready.clear()
        self._runner.clear()
        while not self._team.faults.events.empty():  # answers from before
            self._team.faults.events.get()
        self._team.faults.check()
        for flow in flows:
            flow.start_over()
            self._open(flow)

    def forget(self, group: int) -> None:
        """Give up a group's cache on all stages."""
        self._runner.close(group)
        if self.links is not None:
            self.links.send(closing(group, sender=0), torch.empty(0))

    def _start_more(self, waiting: Iterator[Flow], on_done: Callable[[Flow], None], *, in_flight: int) -> bool:
        while len(self._active) < in_flight:
            flow = next(waiting, None)
            if flow is None:
                return False
            flow.started = time.perf_counter()
            if flow.is_finished:  # nothing was asked for
                on_done(flow)
            else:
                self._open(flow)
        return True

    def _open(self, flow: Flow) -> None:
        flow.group = self._next_group
        self._next_group += 1
        self._runner.open(flow.opening(for_last_stage=False))
        for rank, member in self._team.members.items():
            member.channel.try_send(flow.opening(for_last_stage=rank == self._last_rank))
        self._active[flow.group] = flow
        self._ready.append(flow)

    def _send_step(self, flow: Flow) -> None:
        step, span = flow.step, flow.next_span()
        header = Header(
            kind=STEP,
            sender=0,
            group=flow.group,
            step=step,
            start=span.start,
            rows=len(flow.requests),
            columns=span.end - span.start,
            width=self._hidden_size,
            dtype=self._dtype,
            needs_tokens=int(span.needs_tokens),
        )
        is_prefill = self._runner.is_prefill(header)
        with self._clock.step(group=flow.group, step=step, is_prefill=is_prefill, hop_seconds=0.0):
            outputs = self._runner.run(header, flow.batch.ids(span.start, span.end))
        assert self.links is not None
        self.links.send(header, outputs)
        if flow.has_more_prompt:
            self._ready.append(flow)

    def _take_arrivals(
        self, on_step: Callable[[Flow], None], on_done: Callable[[Flow], None], *, keeps_caches: bool
    ) -> None:
        """Take everything that has arrived; wait for something if there is nothing else to do."""
        is_idle = not self._ready
        while True:
            try:
                event = self._team.faults.events.get(block=is_idle)
            except queue.Empty:
                return
            is_idle = False
            if isinstance(event, Fault):
                self._team.faults.check()
            if isinstance(event, Loss):
                self._recover(event)
                return
            flow = self._active.get(event.header.group) if isinstance(event, Arrival) else None
            if flow is not None:
                self._take(flow, event.payload.tolist(), on_step, on_done, keeps_caches=keeps_caches)

    def _take(
        self,
        flow: Flow,
        tokens: list[int],
        on_step: Callable[[Flow], None],
        on_done: Callable[[Flow], None],
        *,
        keeps_caches: bool,
    ) -> None:
        is_known = bool(flow.replayed_columns)
        flow.take(tokens)
        if not is_known:
            on_step(flow)
        if flow.is_finished:
            del self._active[flow.group]
            if not keeps_caches:
                self.forget(flow.group)
            on_done(flow)
        elif not is_known:
            self._ready.append(flow)

    def _abandon(self) -> None:
        self._ready.clear()
        groups = list(self._active)
        self._active.clear()
        if self._team.faults.fault is None:
            for group in groups:
                self.forget(group)
