"""The planner is told the links of three hosts; the plan it prefers is the one that is faster when both are run."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import started
from networks import Cable, cables
from test_joining import make_key
from transformers import LlamaConfig, PreTrainedConfig

from plans.check import read_plan
from plans.plan import Plan
from tests.conftest import RunCommand

FAST_MBIT, SLOW_MBIT = 1000, 50
PROMPT_TOKENS = 512
WIDE = LlamaConfig(
    hidden_size=4096,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=2048,
    max_position_embeddings=1024,
    dtype="float32",
)
"""Much to send and little to compute, so that what this machine does beside cannot turn the order round: the prompt's
hidden states are 8.4 MB, 1.3 s on the slow cable and a twentieth of that on the fast one."""
WORKLOAD = ["--prompt-tokens", PROMPT_TOKENS, "-n", 2, "-c", 1024, "--execution", "process_per_stage"]
WORKLOAD += ["--objective", "request"]
BYTES_PER_MBIT = 125_000
FARTHER = ("b", "c")
BUDGETS = {"a": "90MiB", "b": "70MiB", "c": "70MiB"}
"""No device holds the model alone, and `b` and `c` have no link: the question is who helps `a`."""


@pytest.fixture
def star() -> Iterator[dict[str, Cable]]:
    """Cables from host a to b and to c."""
    with cables(*(("llamarun-a", f"llamarun-{host}") for host in FARTHER)) as made:
        yield dict(zip(FARTHER, made, strict=True))


def devices(plan: Plan) -> list[str]:
    return [stage.device for stage in plan.stages]


def write_cluster(path: Path, mbit: dict[str, int]) -> Path:
    devices = [
        {
            "name": f"{host}/cpu",
            "host": host,
            "kind": "cpu",
            "memory_bytes": "8GiB",
            "budget_bytes": budget,
            "memory_bandwidth_bytes_per_second": 1e10,
            "flops_per_second": {"fp32": 5e10},
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
    network = ["--listen", cable.address, "--key-file", key, "--trusted-network"]
    with started("bench", path, "--model", model, *size, *network, "--json", host=cable.hosts[0]) as job:
        join = [path, "--model", model, "--rank", 1, "--join", cable.address, "--key-file", key]
        with started(*join, module="runtime.worker", host=cable.hosts[1]) as worker:
            code, out, said = job.end(within=120)
            assert code == 0, said
            assert worker.end(within=20)[0] == 0
    document = json.loads(out)
    assert document["prediction"]["time_to_first_token_seconds"] == plan.prediction.time_to_first_token_seconds
    return float(document["time_to_first_token_seconds"])


@pytest.mark.alone
def test_the_plan_that_is_preferred_for_the_links_is_the_one_that_is_faster(
    star: dict[str, Cable], make_whole: Callable[[PreTrainedConfig], Path], run_command: RunCommand, tmp_path: Path
) -> None:
    wide = make_whole(WIDE)

    def solve(name: str, mbit: dict[str, int], *options: object) -> tuple[Path, Plan]:
        cluster, path = write_cluster(tmp_path / "cluster.json", mbit), tmp_path / f"{name}.json"
        words = ["--cluster", cluster, *WORKLOAD, *options, "-o", path]
        solved = run_command("llamaplan", "solve", wide, *words)
        assert solved.code == 0, solved.err
        return path, read_plan(path)

    b_is_near, c_is_near = {"b": FAST_MBIT, "c": SLOW_MBIT}, {"b": SLOW_MBIT, "c": FAST_MBIT}
    preferred, other = solve("preferred", b_is_near), solve("other", b_is_near, "--ban", "b/cpu")
    assert devices(preferred[1]) == ["a/cpu", "b/cpu"]
    assert devices(other[1]) == devices(solve("turned", c_is_near)[1]) == ["a/cpu", "c/cpu"]
    for host, rate in b_is_near.items():
        star[host].shape(f"tbf rate {rate}mbit burst 16kb latency 2s")
    key = make_key(tmp_path / "key", "correct horse battery")
    predicted = [plan.prediction.time_to_first_token_seconds for _, plan in (preferred, other)]
    measured = [
        measured_seconds(plan, path, wide, key, star[host])
        for host, (path, plan) in zip(FARTHER, (preferred, other), strict=True)
    ]
    assert 2 * predicted[0] < predicted[1]
    assert 2 * measured[0] < measured[1]
