"""`llamaplan links`: measure what lies between hosts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli import options
from planner.cli.next_steps import shown
from plans.commands.console import Output
from plans.commands.option_groups import ScreenOptions, with_option_groups
from plans.errors import UsageError

if TYPE_CHECKING:
    from plans.cluster import Link

PeersArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME=]HOST[:PORT]...", help="Hosts that serve; NAME as in the cluster file.", show_default=False
    ),
]
ServeOption = Annotated[bool, typer.Option("--serve", help="Answer other hosts, until interrupted or --times.")]
ListenOption = Annotated[str, typer.Option("--listen", metavar="ADDRESS[:PORT]", help="With --serve: where.")]
TimesOption = Annotated[
    int | None,
    typer.Option("--times", min=1, help="With --serve: leave after so many measurements.", show_default=False),
]
KeyOption = Annotated[
    Path | None,
    typer.Option(
        "--key-file", metavar="FILE", help="A secret both sides hold; needed beyond this machine.", show_default=False
    ),
]
HereOption = Annotated[str, typer.Option("--from", metavar="NAME", help="What the cluster file calls this host.")]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("links")(links_command)


@with_option_groups
def links_command(
    peers: PeersArgument = None,
    *,
    serve: ServeOption = False,
    listen: ListenOption = "127.0.0.1:29750",
    times: TimesOption = None,
    key_file: KeyOption = None,
    here: HereOption = "local",
    cluster: options.ClusterOption = None,
    output: options.OutputOption = None,
    printed: ScreenOptions,
) -> None:
    """Measure latency and bandwidth between hosts, for a cluster file.

    Example: llamaplan links box2=192.168.1.7 --key-file key --cluster cluster.json -o cluster.json
    """
    screen = printed.output()
    if serve == bool(peers):
        raise UsageError("give either --serve or the hosts to measure", expected="llamaplan links --serve, or HOST...")
    from planner.measure.links import read_key

    key = b"" if key_file is None else read_key(key_file)
    if serve:
        _serve(screen, listen, times=times, key=key)
        return
    _measure(screen, peers or [], key=key, here=here, cluster=cluster, output=output)


def _serve(screen: Output, where: str, *, times: int | None, key: bytes) -> None:
    from planner.measure import links

    _name, address = links.parse_peer(where)
    if not key and not links.is_loopback(address.host):
        raise UsageError(
            f"--listen {address.host} can be reached from other machines",
            hint="give --key-file, so that only those who hold the key are served",
        )
    server, address = links.listen(address)
    with server:
        screen.note(f"listening on {address}")
        done = 0
        while times is None or done < times:
            done += links.serve_one(server, key=key)
    screen.next_step("the same on the other hosts, then llamaplan links HOST... on one of them")


def _measure(
    screen: Output, peers: list[str], *, key: bytes, here: str, cluster: Path | None, output: Path | None
) -> None:
    from planner.measure.cluster import make_link, merge_links
    from planner.measure.links import parse_peer, probe
    from plans.cluster import Cluster
    from plans.reading.files import write_text

    known = Cluster.read(cluster) if cluster is not None else None
    if output is not None and known is None:
        raise UsageError("-o writes a cluster file and needs --cluster, the file to put the links into")
    found: list[Link] = []
    for name, address in map(parse_peer, peers):
        speed = probe(address, key=key)
        for ends, rate in (((here, name), speed.send_bytes_per_second), ((name, here), speed.receive_bytes_per_second)):
            found.append(make_link(*ends, latency_seconds=speed.latency_seconds, bandwidth_bytes_per_second=rate))
            screen.show(f"{ends[0]} to {ends[1]}: {rate / 1e6:.4g} MB/s, {speed.latency_seconds * 1e6:.4g} us")
    screen.data([link.model_dump(mode="json", by_alias=True) for link in found])
    if known is not None:
        merged = known.model_copy(update={"links": merge_links(known.links, found)})
        merged = Cluster.from_json(merged.to_json().encode(), where=cluster)  # names must be the file's own
        if output is not None:
            write_text(output, merged.to_json())
            screen.note(f"wrote {output}")
    screen.next_step(f"llamaplan solve MODEL --cluster {shown(output or 'cluster.json')} -o plan.json")
