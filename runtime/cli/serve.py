"""`llamarun serve`: answer OpenAI clients."""

import socket
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plans.commands.option_groups import ScreenOptions, with_option_groups
from plans.errors import MachineError, UsageError, printable
from runtime.cli import options
from runtime.cli import processes as several

if TYPE_CHECKING:
    from runtime.serve.guard import Rules

LIBRARIES = ("starlette", "uvicorn", "prometheus_client")

SlotsOption = Annotated[int, typer.Option("--slots", min=1, max=1024, help="Requests that run at once.")]
QueueOption = Annotated[int, typer.Option("--queue", min=0, max=100_000, help="Requests that may wait.")]
NameOption = Annotated[str | None, typer.Option("--name", help="What clients call the model; unset: its folder.")]
DrainOption = Annotated[
    float, typer.Option("--drain", min=0, max=86400, help="Seconds that running requests get at the end.")
]
ReuseOption = Annotated[
    bool, typer.Option("--reuse/--no-reuse", help="Keep beginnings of prompts for the next ones with the same key.")
]
HostOption = Annotated[str, typer.Option("--host", help="Address to listen on; any but loopback needs --api-key-file.")]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")]
KeysOption = Annotated[Path | None, typer.Option("--api-key-file", help="Keys, one a line; mode 0600.")]
AllowHostOption = Annotated[
    list[str] | None, typer.Option("--allow-host", help="Another name in the Host header; repeatable.")
]
AllowOriginOption = Annotated[
    list[str] | None, typer.Option("--allow-origin", help="Web pages that may ask, as https://name; repeatable.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessOptions:
    """Where clients connect, and who may."""

    host: HostOption = "127.0.0.1"
    port: PortOption = 8000
    api_key_file: KeysOption = None
    allow_host: AllowHostOption = None
    allow_origin: AllowOriginOption = None

    def rules(self) -> "Rules":
        """Return who may ask.

        Raises:
            UsageError: an address that others reach, without a key.
            MachineError: a key file that others can read, or a short key.
        """
        from runtime.serve.guard import LOOPBACK_HOSTS, Rules

        allowed = [_in_url(self.host), *(self.allow_host or ())]
        hosts = {*LOOPBACK_HOSTS, *(name.lower() for name in allowed)} - {""}
        return Rules(hosts=hosts, origins=self.allow_origin or (), keys=self._keys())

    def _keys(self) -> list[bytes]:
        from runtime.distributed.control.address import is_loopback
        from runtime.distributed.control.keys import MIN_KEY_BYTES, read_key

        if self.api_key_file is not None:
            keys = read_key(self.api_key_file).split()
            short = min(map(len, keys))
            if short < MIN_KEY_BYTES:
                raise MachineError(
                    f"holds a key of {short} bytes",
                    where=self.api_key_file,
                    expected=f"at least {MIN_KEY_BYTES}",
                    code="E-KEY",
                )
            return keys
        if is_loopback(self.host):
            return []
        raise UsageError(
            f"everybody who reaches {printable(self.host, limit=60)} could use the model",
            where="--host",
            expected="--api-key-file FILE, or a loopback address",
            code="E-KEY",
        )


@with_option_groups
def serve(
    context: typer.Context,
    target: options.Target,
    *,
    access: AccessOptions,
    slots: SlotsOption = 4,
    queue: QueueOption = 1000,
    name: NameOption = None,
    drain: DrainOption = 30.0,
    reuse: ReuseOption = True,
    loading: options.LoadingOptions,
    team: several.RestartOptions,
    screen: ScreenOptions,
) -> None:
    """Answer OpenAI clients: chat and completions, many users at once.

    Example: llamarun serve shards/ --port 8000 --slots 8 --ctx-size 4096
    """  # fmt: skip
    output = screen.output()
    _require_libraries()
    rules = access.rules()
    run = several.open_run(context, target, output=output, loading=loading, team=team)
    with run.session(batch_size=slots) as session:
        from runtime.serve.run import ServeSettings, serve

        listener = _listen(access.host, access.port)
        settings = ServeSettings(
            name=name or run.prepared.source.folder.resolve().name,
            num_slots=slots,
            queue_limit=queue,
            drain_seconds=drain,
            has_reuse=reuse,
            chunk_tokens=loading.prefill_chunk,
            rules=rules,
            url=f"http://{_in_url(access.host)}:{listener.getsockname()[1]}",
        )
        with listener:
            serve(session, listener, settings, output=output)


def _require_libraries() -> None:
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise UsageError(f"{missing[0]} is not installed", hint="pip install 'llamaplan[serve]'", code="E-SERVE")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        MachineError: the port is taken, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise MachineError(
            f"cannot listen: {error.strerror or error} (errno {error.errno})",
            where=f"{printable(host, limit=60)}:{port}",
            hint="another server may have the port ('ss -ltnp' shows whose it is); --port 0 takes a free one",
            code="E-LISTEN",
        ) from None
