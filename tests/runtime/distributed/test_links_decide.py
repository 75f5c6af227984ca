"""The planner is told the links of three hosts; the plan it prefers is the one that is faster when both are run."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import started
from networks import Cable, cables
from test_joining import address_of, make_key

from plans.check import read_plan
from plans.plan import Plan
from tests.conftest import RunCommand

FAST_MBIT, SLOW_MBIT = 1000, 1
"""A factor of 1000, so that what this machine does beside cannot turn the order round: the prompt's hidden states are
98 kB, which is 0.8 s on the slow cable and far less than the computing on the fast one."""
PROMPT_TOKENS = 256
BYTES_PER_MBIT = 125_000
FARTHER = ("b", "c")
BUDGETS = {"a": "8MiB", "b": "4MiB", "c": "4MiB"}
"""No device holds the model alone, and without `a` it does not fit: the question is who helps."""


@pytest.fixture
def star() -> Iterator[dict[str, Cable]]:
    """Cables from host a to b and to c."""
    with cables(*(("llamarun-a", f"llamarun-{host}") for host in FARTHER)) as made:
        yield dict(zip(FARTHER, made, strict=True))


def write_cluster(path: Path, mbit: dict[str, int]) -> Path:
    devices = [
        {
            "name": f"{host}/cpu",
            "host": host,
            "kind": "cpu",
            "memory_bytes": "8GiB",
            "budget_bytes": budget,
            "memory_bandwidth_bytes_per_second": 1e10,
            "flops_per_second": {"bf16": 3e10},
            "unit_overhead_seconds": 2e-4,
        }
        for host, budget in BUDGETS.items()
    ]
    links = [
        {"from": "a", "to": host, "bandwidth_bytes_per_second": BYTES_PER_MBIT * rate, "latency_seconds": 2e-4}
        for host, rate in mbit.items()
    ]
    path.write_text(json.dumps({"hosts": [{"name": host} for host in BUDGETS], "devices": devices, "links": links}))
    return path


def measured_seconds(plan: Plan, path: Path, model: Path, key: Path, cable: Cable) -> float:
    """Run a plan on the hosts it names; returns the time to the first token."""
    size = ["--prompt-tokens", PROMPT_TOKENS, "-n", 2, "--repeats", 1, "--threads", 1, "--speed", "reference"]
    network = ["--listen", f"{cable.address}:0", "--key-file", key, "--trusted-network"]
    with started("bench", path, "--model", model, *size, *network, "--json", host=cable.hosts[0]) as job:
        join = [path, "--model", model, "--rank", 1, "--join", address_of(job), "--key-file", key]
        with started(*join, module="runtime.worker", host=cable.hosts[1]) as worker:
            code, out, said = job.end(within=120)
            assert code == 0, said
            assert worker.end(within=20)[0] == 0
    document = json.loads(out)
    assert document["prediction"]["time_to_first_token_seconds"] == plan.prediction.time_to_first_token_seconds
    return float(document["time_to_first_token_seconds"])


@pytest.mark.parametrize("near", FARTHER)
def test_the_plan_that_is_preferred_for_the_links_is_the_one_that_is_faster(
    star: dict[str, Cable], shipped: Path, run_command: RunCommand, tmp_path: Path, near: str
) -> None:
    mbit = {host: FAST_MBIT if host == near else SLOW_MBIT for host in FARTHER}
    for host, rate in mbit.items():
        star[host].shape(f"tbf rate {rate}mbit burst 16kb latency 2s")
    cluster = write_cluster(tmp_path / "cluster.json", mbit)
    key = make_key(tmp_path / "key", "correct horse battery")
    workload = ["--prompt-tokens", PROMPT_TOKENS, "-n", 2, "-c", 512, "--execution", "process_per_stage"]
    predicted, measured = {}, {}
    for banned in (None, near):
        path = tmp_path / f"{banned}.json"
        options = ["--objective", "request", *([] if banned is None else ["--ban", f"{banned}/cpu"])]
        solved = run_command("llamaplan", "solve", shipped, "--cluster", cluster, *workload, *options, "-o", path)
        assert solved.code == 0, solved.err
        plan = read_plan(path)
        first, second = (stage.device.removesuffix("/cpu") for stage in plan.stages)
        assert first == "a"
        if banned is None:
            assert second == near
        predicted[second] = plan.prediction.time_to_first_token_seconds
        measured[second] = measured_seconds(plan, path, shipped, key, star[second])
    far = "c" if near == "b" else "b"
    assert 2 * predicted[near] < predicted[far]
    assert 2 * measured[near] < measured[far]
