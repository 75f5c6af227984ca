"""What people type: sizes, devices, margins, cuts, pins, partitions, addresses, models.

A spelling is text; several values of one repeatable option are one text with a separator between them.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from planner.cli.ask import chunk_tokens
from planner.cli.compare import read_partitions
from planner.devices.budgets import parse_margins, with_budgets
from planner.devices.machine import cluster_from_options
from planner.measure.links import parse_peer
from planner.model.find import find_model
from planner.model.workloads import parse_dtype
from planner.problem.demands import read_demands
from plans.checkpoint.folder import open_checkpoint
from plans.cluster import Cluster, Host
from plans.errors import LlamaplanError
from plans.plan import Demands
from plans.reading.sizes import MAX_BYTES, parse_bytes
from runtime.distributed.control.address import parse_address
from runtime.reading.devices import torch_device
from runtime.reading.opening import parse_device_map
from tests.hostile.fuzz_files import EXAMPLES
from tests.hostile.fuzz_reader import Reader, reader, reads_back
from tests.hostile.mutations import mutate_text
from tests.planner.cases import cluster, device

LAYERS = 22
DEVICES = ("cuda:0", "cuda:1", "cpu")
BETWEEN = "\x1e"


@reader
def sizes(folder: Path) -> Reader:
    """`20GiB`."""

    def read(text: str) -> None:
        size = parse_bytes(text)
        assert 0 <= size <= MAX_BYTES
        assert parse_bytes(str(size)) == size

    return _spellings(("20GiB", "1.5TB", "7", "512 MiB", "0.5KB", "1152921504606846976", "0B", "1e3"), read)


@reader
def devices(folder: Path) -> Reader:
    """`--device`."""
    seeds = ("cpu=16GiB", "cuda:0=20GiB", "2xrtx4090", "cpu", "h100-pcie=70GiB", "3xcpu=1GiB", "cuda", "255xm1")
    return _spellings(seeds, lambda text: reads_back(cluster_from_options(text.split(BETWEEN))), most=3)


@reader
def margins(folder: Path) -> Reader:
    """`--margin`."""
    devices = (device("cpu", budget_bytes=None), device("cuda:0", kind="cuda", budget_bytes=None))
    offered = cluster(*devices, hosts=())

    def read(text: str) -> None:
        found = with_budgets(offered, parse_margins(text.split(BETWEEN)))
        assert all(0 < (d.budget_bytes or 0) <= d.memory_bytes for d in found.devices)
        reads_back(found)

    return _spellings(("10%", "2GiB", "cuda:0=200MiB", "cpu=20%", "0.5%", "cuda=1/3%", "99.9%", "0"), read, most=3)


@reader
def cuts(folder: Path) -> Reader:
    """`--layers`."""
    seeds = ("12,6,4", "12,*,4", "22", "*", "0,22,0", "0-16@cuda:0,16-22@cpu", "0-0@cuda:1,0-22@cpu", "4-9@cuda:1")
    return _spellings(seeds, lambda text: _demanded(Demands(layers=text)))


@reader
def pins(folder: Path) -> Reader:
    """`--pin`."""
    seeds = ("0-4@cuda:0", "embedding@cpu", "head@cuda:1", "7@cpu", "0-22@cuda:0")
    return _spellings(seeds, lambda text: _demanded(Demands(pins=tuple(text.split(BETWEEN)))), most=3)


@reader
def bans(folder: Path) -> Reader:
    """`--ban`."""
    seeds = ("cuda:1", "0-4@cpu", "embedding@cuda:0", "head@cpu", "21@cuda:1")
    return _spellings(seeds, lambda text: _demanded(Demands(bans=tuple(text.split(BETWEEN)))), most=3)


@reader
def partitions(folder: Path) -> Reader:
    """`--partition`."""
    offered = cluster(*(device(name, kind="cuda" if "cuda" in name else "cpu") for name in DEVICES))
    layers = ", ".join(f'"model.layers.{i}": {i % 2}' for i in range(LAYERS))
    seeds = (
        *("vllm:11,11", "sglang:7,8,7", "llama.cpp:6,5/ngl=11", "llama.cpp:0.5,0.5", "tensorrt_llm:11,11"),
        f'accelerate:{{"model.embed_tokens": 0, {layers}, "model.norm": 1, "lm_head": "cpu"}}',
        'transformers:{"": 0}',
    )
    return _spellings(seeds, lambda text: read_partitions([text], cluster=offered, num_layers=LAYERS))


@reader
def addresses(folder: Path) -> Reader:
    """`--listen` and `--connect`, `links --peers`, and addresses of a cluster file."""
    template = Cluster.read(EXAMPLES / "lab.json")
    seeds = ("192.168.1.10:29501", "[::1]:0", "unix:/tmp/x", "gpu-box:29501", "lab=[fe80::1%eth0]:7", "localhost")

    def read(text: str) -> None:
        host = template.hosts[0].model_dump() | {"address": text}
        _each(
            lambda: _same_address(text),
            lambda: parse_peer(text),
            lambda: Host.from_json(json.dumps(host).encode(), where="host"),
        )

    return _spellings(seeds, read)


@reader
def device_maps(folder: Path) -> Reader:
    """`--device-map`, up to the torch devices."""

    def read(text: str) -> None:
        for name in parse_device_map(text.split(BETWEEN), num_stages=3).values():
            torch_device(name)

    return _spellings(("0=cpu", "1=cuda:0,2=cpu", "cpu", "box1/cpu#1", "2=cpu#0", "cuda:1", "meta", "0=xpu:7"), read)


@reader
def models(folder: Path) -> Reader:
    """What is given as MODEL, and the short words of other options."""
    (folder / "hub" / "models--org--name" / "snapshots" / "abc").mkdir(parents=True)
    environment = {"HF_HUB_CACHE": str(folder / "hub")}
    inside = str(folder / "hub" / "models--org--name")

    def read(text: str) -> None:
        _each(
            lambda: open_checkpoint(find_model(text, environment=environment)),
            lambda: parse_dtype(text),
            lambda: chunk_tokens(text),
        )

    return _spellings(("org/name", inside, "./model", "~/model", "config.json", "bf16", "bfloat16", "2048"), read)


def _spellings(seeds: Sequence[str], read: Callable[[str], object], *, most: int = 1) -> Reader:
    def make(rng: Random) -> bytes:
        values = rng.choices(seeds, k=rng.randint(1, most))
        values[0] = mutate_text(rng, values[0], pieces=(*seeds, "cuda:0", "@", "="))
        # As an argument reaches Python: bytes that are not UTF-8 are lone surrogates.
        return BETWEEN.join(values).encode("utf-8", "surrogatepass")

    return Reader(make=make, read=lambda data: read(data.decode("utf-8", "surrogatepass")))


def _demanded(demands: Demands) -> None:
    read_demands(demands, names=DEVICES, num_layers=LAYERS)


def _same_address(text: str) -> None:
    address = parse_address(text, where="--listen")
    assert parse_address(str(address), where="again") == address, "reads back as something else"


def _each(*attempts: Callable[[], object]) -> None:
    """Try all, also where one is refused, and refuse at the end."""
    refused = []
    for attempt in attempts:
        try:
            attempt()
        except LlamaplanError as error:
            refused.append(error)
    if refused:
        raise refused[0]
