"""The options of commands that can run every stage in a process of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plans.commands.console import Output
from plans.errors import MachineError, PeerError, UsageError, printable
from runtime.cli.opening import load, prepare
from runtime.cli.options import LoadingOptions

if TYPE_CHECKING:
    from runtime.distributed.control.address import Address
    from runtime.distributed.control.launch import LocalWorkers
    from runtime.distributed.session import ProcessSettings
    from runtime.prepared import Prepared
    from runtime.session import AnySession

ProcessesOption = Annotated[
    bool, typer.Option("--processes", help="Run every stage in a process of its own, started here.")
]
ListenOption = Annotated[
    str | None,
    typer.Option("--listen", metavar="ADDR:PORT", help="Wait here for workers from other hosts instead."),
]
KeyOption = Annotated[
    Path | None, typer.Option("--key-file", help="Key that workers from other hosts must have; mode 0600.")
]
TrustedOption = Annotated[
    bool,
    typer.Option("--trusted-network", help="The network between the hosts is private: data on it is not encrypted."),
]
HeartbeatOption = Annotated[
    float,
    typer.Option("--heartbeat-timeout", min=0.5, max=86400, help="Seconds of silence after which a process is lost."),
]
JoinOption = Annotated[
    float, typer.Option("--join-timeout", min=1, max=86400, help="Seconds to wait for every worker to join.")
]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Start a lost worker again and go on where the text was.")
]
InFlightOption = Annotated[
    str | None,
    typer.Option("--in-flight", metavar="N|auto", help="Times --batch-size at once with --processes; unset: auto."),
]
WorldOption = Annotated[int | None, typer.Option("--world-size", hidden=True)]


MAX_RESTARTS = 3
"""Lost workers that one run replaces: whatever takes more of them will not stop."""


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """Whether and how stages run in processes of their own."""

    processes: ProcessesOption = False
    listen: ListenOption = None
    key_file: KeyOption = None
    trusted_network: TrustedOption = False
    heartbeat_timeout: HeartbeatOption = 30.0
    join_timeout: JoinOption = 60.0
    world_size: WorldOption = None

    @property
    def num_restarts(self) -> int:
        """Lost workers that are replaced."""
        return 0

    @property
    def is_used(self) -> bool:
        """Whether several processes were asked for."""
        return self.processes or self.listen is not None

    @property
    def only_stage(self) -> int | None:
        """The stage whose bundle must lie here: with workers elsewhere, only the first."""
        return None if self.listen is None else 0

    def check(self) -> None:
        """Check what can be checked before anything is opened.

        Raises:
            UsageError: an address that is none, or a network without a key.
            MachineError: a network that nobody said is trusted, or a key that others can read.
        """
        self.key()

    def workers(self, context: typer.Context, target: Path, *, model: Path | None) -> "LocalWorkers | None":
        """Return the workers of this machine, which end with the command; None if there are none."""
        if not self.is_used or self.listen is not None:
            return None
        from runtime.distributed.control.launch import LocalWorkers

        return context.with_resource(LocalWorkers(target, model=model))

    def address(self) -> "Address | None":
        """Return where workers from other hosts join, if they can; errors as `check`."""
        from runtime.distributed.control.address import parse_address

        return None if self.listen is None else parse_address(self.listen, where="--listen")

    def key(self) -> bytes:
        """Return what workers from other hosts must prove; errors as `check`."""
        from runtime.distributed.control.address import is_loopback
        from runtime.distributed.control.keys import read_key

        address = self.address()
        if address is None or address.is_unix:
            return b""
        if self.key_file is None:
            raise UsageError("listening on a network needs a key", expected="--key-file FILE", code="E-KEY")
        if not is_loopback(address.host) and not self.trusted_network:
            raise _untrusted(str(address))
        return read_key(self.key_file)


@dataclass(frozen=True, kw_only=True)
class RestartOptions(ProcessOptions):
    """The same for commands whose work can be taken up again."""

    restart: RestartOption = False

    @property
    def num_restarts(self) -> int:
        """Lost workers that are replaced."""
        return MAX_RESTARTS if self.restart else 0


def choose_in_flight(choices: ProcessOptions, prepared: "Prepared", text: str | None) -> int:
    """Return how many batches are kept under way: what was asked for, else the plan's, else one per stage.

    Raises:
        UsageError: not a count, or several in one process.
    """
    from plans.reading.sizes import parse_count

    asked = None if text in {None, "auto"} else parse_count(text or "")
    if text not in {None, "auto"} and not asked:
        raise UsageError(
            f"'{printable(text, limit=40)}' is no count", where="--in-flight", expected="a number from 1, or auto"
        )
    if not choices.is_used:
        if (asked or 1) > 1:
            raise UsageError("one process computes one batch at a time", where="--in-flight", hint="add --processes")
        return 1
    if asked:
        return asked
    planned = prepared.source.plan.workload.requests_in_flight if prepared.source.plan else 1
    return planned if planned > 1 else len(prepared.source.stages)


def check_world_size(prepared: "Prepared", choices: ProcessOptions) -> None:
    """Require as many processes as there are stages.

    Raises:
        PeerError: torchrun was told another number.
        UsageError: there is only one stage.
    """
    count = len(prepared.source.stages)
    if choices.world_size is not None and choices.world_size != count:
        raise PeerError(
            f"torchrun started {choices.world_size} processes for {count} stages",
            expected=f"--nproc-per-node {count} on one host, or {count} over all hosts",
            code="E-RANK",
        )
    if count < 2:
        raise UsageError("there is only one stage to run", hint="leave --processes out, or plan for several devices")


@dataclass(frozen=True, slots=True)
class Run:
    """A command's model, prepared; `session` loads it."""

    output: Output
    prepared: "Prepared"
    loading: LoadingOptions
    team: ProcessOptions
    workers: "LocalWorkers | None"

    @contextmanager
    def session(
        self, *, cache_tokens: int | None = None, batch_size: int = 1, traces: bool = False
    ) -> "Iterator[AnySession]":
        """Load the model in this process, or in one process per stage that end with the block."""
        if not self.team.is_used:
            yield load(
                self.output,
                self.prepared,
                cache_tokens=cache_tokens,
                batch_size=batch_size,
                verify=self.loading.verify,
                speed=self.loading.speed,
            )
            return
        check_world_size(self.prepared, self.team)
        from runtime.distributed.opening import open_processes

        with self.output.spinner("starting", style="line") as say:
            opened = open_processes(
                self.prepared,
                self._settings(traces=traces),
                cache_tokens=cache_tokens,
                batch_size=batch_size,
                verifies=self.loading.verify,
                progress=say,
            )
        with opened as session:
            yield session

    def _settings(self, *, traces: bool) -> "ProcessSettings":
        from runtime.distributed.control.silence import Patience
        from runtime.distributed.session import ProcessSettings

        team = self.team
        return ProcessSettings(
            workers=self.workers,
            listen=team.address(),
            key=team.key(),
            patience=Patience(join_seconds=team.join_timeout, heartbeat_seconds=team.heartbeat_timeout),
            threads=self.loading.threads,
            speed=self.loading.speed,
            traces=traces,
            num_restarts=team.num_restarts,
            note=self.output.note,
        )


def open_run(
    context: typer.Context,
    target: Path,
    *,
    output: Output,
    loading: LoadingOptions,
    team: ProcessOptions,
    needs_text: bool = True,
) -> Run:
    """Check how processes are wanted, start those of this machine, and read everything of a model but its weights."""
    team.check()
    workers = team.workers(context, target, model=loading.model)
    prepared = prepare(output, target, loading, only_stage=team.only_stage, workers=workers, needs_text=needs_text)
    return Run(output, prepared, loading, team, workers)


def write_trace(session: "AnySession", path: Path) -> None:
    """Write what every stage did since it was last asked."""
    from plans.reading.files import write_text
    from plans.reading.strict import dump_json
    from runtime.distributed.clocks import trace_document
    from runtime.distributed.session import ProcessSession

    assert isinstance(session, ProcessSession)
    write_text(path, dump_json(trace_document(session.take_numbers(), session.stage_views(batch_size=1))))


def _untrusted(address: str) -> MachineError:
    return MachineError(
        "the data between the hosts would be open to everybody on that network",
        where=address,
        expected="--trusted-network, if the network is private",
        hint="torch.distributed neither checks who connects nor encrypts: use a network of your own, WireGuard, or "
        "SSH tunnels (docs/distributed.md)",
        code="E-NETWORK",
    )
