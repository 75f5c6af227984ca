"""The faults table for clusters and for the solver: rows D1-D9 and L7-L16 of `docs/faults.md`, by whole commands."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.cluster import Cluster
from plans.errors import InputError
from plans.reading.strict import dump_json
from tests.conftest import SHIPPED, Finished, RunCommand

INPUT, USAGE, INFEASIBLE, INTEGRITY, MACHINE = 3, 2, 4, 5, 6
EXAMPLE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "plans/examples/demo.json").read_text())

Change = Callable[[dict[str, Any]], object]


def changed(change: Change) -> bytes:
    """The example cluster with a change, as the bytes of a file."""
    cluster = copy.deepcopy(EXAMPLE)
    change(cluster)
    return json.dumps(cluster).encode()


def device(**values: object) -> bytes:
    return changed(lambda c: c["devices"][0].update(values))


def link(**values: object) -> bytes:
    return changed(lambda c: c["links"][0].update(values))


def more_links(*links: dict[str, object]) -> bytes:
    speed = {"bandwidth_bytes_per_second": 1e9, "latency_seconds": 0.0}
    return changed(lambda c: c["links"].extend(speed | link for link in links))


def address(text: object) -> bytes:
    return changed(lambda c: c["hosts"][0].update(address=text))


ROWS: dict[str, tuple[bytes, str]] = {
    "D1 empty": (b"", "empty"),
    "D1 not JSON": (b"devices: cpu", ":1:1"),
    "D1 truncated": (json.dumps(EXAMPLE).encode()[:-40], "JSON"),
    "D1 nested too deeply": (b'{"devices":' * 100_000, "levels"),
    "D1 a plan": (b'{"schema_version": 1, "strategy": "memory", "devices": []}', "/"),
    "D2 no devices": (changed(lambda c: c["devices"].clear()), "/devices"),
    "D2 two devices of one name": (changed(lambda c: c["devices"].append(c["devices"][0])), "two devices are called"),
    "D2 a device called as its host": (device(name="workstation"), "share a name"),
    "D2 a host that is not listed": (device(host="elsewhere"), "elsewhere"),
    "D5 a link to itself": (more_links({"from": "cpu", "to": "cpu"}), "itself"),
    "D5 a link to nowhere": (more_links({"from": "cpu", "to": "moon"}), "moon"),
    "D5 a link with one end": (more_links({"from": "cpu"}), "from and to"),
    "D5 the same link twice": (
        more_links({"from": "cpu", "to": "cuda:0"}, {"from": "cpu", "to": "cuda:0"}),
        "two link",
    ),
    "D5 an unknown class": (link(**{"class": "telepathy"}), "class"),
    "D6 bandwidths from 1 to 1e15": (device(memory_bandwidth_bytes_per_second=1.0), "1e+09"),
    "D6 a rate beyond reason": (device(memory_bandwidth_bytes_per_second=1e300), "memory_bandwidth"),
    "D6 no rate for any dtype": (device(flops_per_second={}), "flops_per_second"),
}
for bad in (0, -1, 80.5, True, "80 potatoes", "-1GiB", "1e30", "", None, 10**30, [1]):
    ROWS[f"D3 memory {bad!r}"] = (device(memory_bytes=bad), "memory_bytes" if bad != 10**30 else "too large")
ROWS["D3 memory NaN"] = (device(memory_bytes=1).replace(b'"memory_bytes": 1,', b'"memory_bytes": NaN,'), "NaN")
ROWS["D3 memory 1e999"] = (device(memory_bytes=1).replace(b'"memory_bytes": 1,', b'"memory_bytes": 1e999,'), "1e999")
ROWS["D3 more budget than memory"] = (device(budget_bytes="1TiB"), "exceed memory_bytes")
for bad in (0, -1.0, "1", True, None):
    ROWS[f"D5 bandwidth {bad!r}"] = (link(bandwidth_bytes_per_second=bad), "/links/0/bandwidth_bytes_per_second")
for bad in (-1e-6, "1", True, None, 1e9):
    ROWS[f"D5 latency {bad!r}"] = (link(latency_seconds=bad), "/links/0/latency_seconds")
for bad in ("box:0", "box:70000", "bo x", "::1", "-box", "box:http", "", 7, "x" * 300, "a\nb", "[::1]:99999"):
    ROWS[f"D9 address {str(bad)[:12]!r}"] = (address(bad), "/hosts/0/address")


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.row(case.split()[0])) for case in ROWS])
def test_a_broken_cluster_file_ends_in_one_clear_sentence(case: str, run_command: RunCommand, tmp_path: Path) -> None:
    data, says = ROWS[case]
    path, plan = tmp_path / "cluster.json", tmp_path / "plan.json"
    path.write_bytes(data)
    done = run_command("llamaplan", "solve", SHIPPED, "--cluster", path, "-o", plan)
    assert done.code == INPUT, done.err
    assert_one_error(done, says)
    assert str(path) in done.err
    assert f"{path}::" not in done.err
    assert not plan.exists()


def assert_one_error(done: Finished, *says: str) -> None:
    errors = [line for line in done.err.splitlines() if line.startswith("error[E-")]
    assert len(errors) == 1, done.err
    assert "Traceback" not in done.err
    for words in says:
        assert words in errors[0]


@pytest.mark.row("D1")
def test_a_missing_cluster_file_and_a_folder_are_named(run_command: RunCommand, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.json", tmp_path):
        done = run_command("llamaplan", "devices", "--cluster", path)
        assert done.code == INPUT
        assert_one_error(done, str(path))


@pytest.mark.row("D3")
@given(st.one_of(st.floats(), st.integers(max_value=0), st.booleans(), st.text(max_size=12), st.none()))
def test_a_memory_that_is_no_size_is_refused(value: Any) -> None:
    """Only whole numbers above 0 and the documented sizes are accepted."""
    from plans.errors import LlamaplanError
    from plans.reading.sizes import parse_bytes

    cluster = copy.deepcopy(EXAMPLE)
    del cluster["devices"][0]["budget_bytes"]
    cluster["devices"][0]["memory_bytes"] = value
    try:
        is_size = isinstance(value, str) and parse_bytes(value) > 0
    except LlamaplanError:
        is_size = False
    data = json.dumps(cluster).encode()
    if is_size:
        assert Cluster.from_json(data, where="c").devices[0].memory_bytes == parse_bytes(value)
        return
    with pytest.raises(InputError):
        Cluster.from_json(data, where="c")


@pytest.mark.row("D5")
@given(st.sampled_from(["bandwidth_bytes_per_second", "latency_seconds"]), st.floats())
def test_a_link_takes_speeds_that_make_sense_and_no_others(key: str, value: float) -> None:
    is_good = 0 < value <= 1e18 if key.startswith("bandwidth") else 0 <= value <= 1e6
    data = link(**{key: value})
    if is_good:
        assert getattr(Cluster.from_json(data, where="c").links[0], key) == value
        return
    with pytest.raises(InputError):
        Cluster.from_json(data, where="c")


@pytest.mark.row("D2")
def test_names_that_only_look_alike_stay_apart(run_command: RunCommand, tmp_path: Path) -> None:
    """`a-b` and `a_b` are two devices."""

    def rename(cluster: dict[str, Any]) -> None:
        cluster["devices"][0]["name"], cluster["devices"][1]["name"] = "a-b", "a_b"

    (tmp_path / "cluster.json").write_bytes(changed(rename))
    done = run_command("llamaplan", "devices", "--cluster", tmp_path / "cluster.json", "--json")
    assert [entry["name"] for entry in json.loads(done.out)["devices"]] == ["a-b", "a_b", "cpu"]


@pytest.mark.row("D4")
@pytest.mark.parametrize(("size", "num_bytes"), [("20GB", 20 * 10**9), ("20GiB", 20 << 30), ("20 GiB", 20 << 30)])
def test_sizes_are_echoed_in_bytes_by_the_plan(
    run_command: RunCommand, tmp_path: Path, size: str, num_bytes: int
) -> None:
    """20GB is not 20GiB, and the plan says which it was."""
    (tmp_path / "cluster.json").write_bytes(device(memory_bytes=size, budget_bytes=size))
    done = run_command("llamaplan", "solve", SHIPPED, "--cluster", tmp_path / "cluster.json", "--json")
    assert json.loads(done.out)["cluster"]["devices"][0]["budget_bytes"] == num_bytes


@pytest.mark.row("D9")
@pytest.mark.parametrize("text", ["box", "box:8080", "10.0.0.7", "[::1]", "[fe80::1%eth0]:443", "a.b-c.example:1"])
def test_addresses_that_hosts_may_have(text: str) -> None:
    assert Cluster.from_json(address(text), where="c").hosts[0].address == text


# --- at load: what was planned for is not here ----------------------------------------------------------------------


def plan_for(*devices: str) -> str:
    from planner import solve_model

    return solve_model(SHIPPED, devices=devices, layers=[4, 3][: len(devices)]).to_json()


@pytest.mark.row("D7")
@pytest.mark.parametrize("name", ["cuda:7", "rtx3090"])
def test_a_device_that_is_not_here_is_named_with_those_that_are(
    run_command: RunCommand, tmp_path: Path, name: str
) -> None:
    (tmp_path / "plan.json").write_text(plan_for(f"{name}=1GiB", "cpu=1GiB"))
    done = run_command("llamarun", "generate", tmp_path / "plan.json", "--model", SHIPPED, "-p", "x", "-n", "1")
    assert done.code == MACHINE, done.err
    assert_one_error(done, name, "cpu", "--device-map")


@pytest.mark.row("D7")
def test_a_gpu_that_is_named_twice_is_refused(run_command: RunCommand) -> None:
    done = run_command("llamaplan", "solve", SHIPPED, "--device", "cuda:0=1GiB", "--device", "cuda:0=1GiB")
    assert done.code == USAGE
    assert_one_error(done, "cuda:0", "2 times")


@pytest.mark.row("D8")
def test_more_memory_planned_for_than_is_free_is_refused_at_load_with_both_numbers(
    run_command: RunCommand, tmp_path: Path
) -> None:
    """A cache of terabytes, on a processor that is said to have them."""
    model, plan, context = tmp_path / "model", tmp_path / "plan.json", 10**9
    shutil.copytree(SHIPPED, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    planned = run_command("llamaplan", "solve", model, "--device", "cpu=100TiB", "-c", context, "-o", plan)
    assert planned.code == 0, planned.err
    done = run_command("llamarun", "generate", plan, "--model", model, "-p", "x", "-c", context)
    assert done.code == MACHINE, done.err
    assert_one_error(done, "cpu", "need", "are free", "--ctx-size")


# --- plans and the solver -------------------------------------------------------------------------------------------


@pytest.mark.row("L7")
def test_a_plan_on_a_device_that_its_cluster_lacks_is_refused(run_command: RunCommand, tmp_path: Path) -> None:
    plan = json.loads(plan_for("cpu=1GiB", "cpu=1GiB"))
    plan["stages"][1]["device"] = "tpu:0"
    (tmp_path / "plan.json").write_text(dump_json(plan))
    done = run_command("llamaplan", "show", tmp_path / "plan.json")
    assert done.code == INPUT
    assert_one_error(done, "tpu:0", "/stages/1/device")


@pytest.mark.row("L9")
def test_one_byte_decides_between_a_plan_and_a_shortage(run_command: RunCommand) -> None:
    load = ("-c", "256", "--prompt-tokens", "64", "--new-tokens", "64", "--json")
    roomy = json.loads(run_command("llamaplan", "solve", SHIPPED, "--device", "rtx3090=1GiB", *load).out)
    needed = sum(roomy["stages"][0][f"{part}_bytes"] for part in ("weight", "kv_cache", "activation", "overhead"))
    exact = run_command("llamaplan", "solve", SHIPPED, "--device", f"rtx3090={needed}", *load)
    short = run_command("llamaplan", "solve", SHIPPED, "--device", f"rtx3090={needed - 1}", *load)
    assert exact.code == 0, exact.err
    assert json.loads(exact.out)["prediction"]["max_memory_share"] == 1.0
    assert short.code == INFEASIBLE
    assert_one_error(short, "the smallest shortage is 1 bytes", f"a budget of {needed} bytes")


def wide_cluster(tmp_path: Path, *, num_devices: int) -> Path:
    """So many unlike devices that nothing can prove an optimum in a moment."""

    def grow(cluster: dict[str, Any]) -> None:
        proto = cluster["devices"][0]
        cluster["devices"] = [
            proto | {"name": f"cuda:{i}", "memory_bytes": 10_000_000 + 1000 * i, "budget_bytes": 1_500_000 + 70_001 * i,
                     "memory_bandwidth_bytes_per_second": 9e10 + 7e9 * (i * i % 17) + 1e6 * i}
            for i in range(num_devices)
        ]  # fmt: skip
        cluster["links"] += [
            {"from": f"cuda:{a}", "to": f"cuda:{b}", "latency_seconds": 1e-6 * (1 + (a * 7 + b * 13) % 29),
             "bandwidth_bytes_per_second": 1e9 * (1 + (a * 5 + b * 3) % 11)}
            for a in range(num_devices) for b in range(num_devices) if a != b
        ]  # fmt: skip

    path = tmp_path / "cluster.json"
    path.write_bytes(changed(grow))
    return path


@pytest.mark.row("L10")
def test_a_time_limit_that_is_too_short_gives_a_plan_with_its_bound_or_says_so(
    run_command: RunCommand, tmp_path: Path
) -> None:
    """The plan is checked, and says that it is not proved and how far it may be off."""
    cluster = wide_cluster(tmp_path, num_devices=24)
    done = run_command("llamaplan", "solve", SHIPPED, "--cluster", cluster, "--time-limit", "0.05", "--json")
    if done.code == INFEASIBLE:
        assert_one_error(done, "no plan was found in 0.05 s, and none was proved impossible", "--time-limit")
        return
    assert done.code == 0, done.err
    proof = json.loads(done.out)["proof"]
    assert proof["status"] == "feasible"
    assert proof["certified_by"] is None
    assert 0 <= proof["bound"] <= proof["objective"]
    assert proof["gap"] == pytest.approx(1 - proof["bound"] / proof["objective"])


FAKE_SOLVERS = {
    "is not executable": None,
    "is of another kind": b"\x7fELF\x02\x01\x01" + bytes(50),
    "dies": b"#!/bin/sh\nkill -9 $$\n",
    "writes garbage": b"#!/bin/sh\necho hello\nexit 0\n",
}


@pytest.mark.row("L11")
@pytest.mark.parametrize("how", FAKE_SOLVERS)
def test_a_solver_program_that_does_not_work_is_an_environment_error(tmp_path: Path, how: str) -> None:
    """By CBC, which is a program of its own; HiGHS is a library in the solver process."""
    body = FAKE_SOLVERS[how]
    program = tmp_path / "cbc"
    program.write_bytes(body or b"#!/bin/sh\n")
    program.chmod(0o755 if body is not None else 0o644)
    code = f"import pulp; pulp.PULP_CBC_CMD.pulp_cbc_path = {str(program)!r}"
    done = solve_with(code, tmp_path, "--solver", "cbc")
    assert done.code == MACHINE, done.err
    assert_one_error(done, "CBC")
    assert list(tmp_path.iterdir()) == [program]


def solve_with(preparation: str, folder: Path, *options: str, **environment: str) -> Finished:
    """Run `llamaplan solve` in a process of its own whose solver process first runs `preparation`."""
    script = (
        "import sys; from planner import cli; from planner.program import session; "
        f"code = {preparation!r} + '; from planner.program.session import serve; serve()'; "
        "start = session._start; session._start = lambda _: start([sys.executable, '-c', code]); "
        "cli.main()"
    )
    command = [sys.executable, "-c", script, "solve", str(SHIPPED), "--device", "rtx3090=1GiB", *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[1])} | environment,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.mark.row("L15")
@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_a_temporary_folder_that_cannot_be_written(tmp_path: Path, solver: str) -> None:
    """HiGHS needs none; CBC says so. Nothing is written next to the plan."""
    done = solve_with("pass", tmp_path, "--solver", solver, TMPDIR="/proc/nowhere")
    work = [path for path in tmp_path.iterdir() if path.suffix in (".mps", ".sol", ".lp")]
    assert work == []
    if solver == "highs" or done.code == 0:
        assert done.code == 0, done.err
        return
    assert done.code == MACHINE
    assert_one_error(done, "CBC")


@pytest.mark.row("L16")
def test_two_planners_at_once_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        runs = [
            pool.submit(solve_with, "pass", tmp_path, "--solver", solver, "--strategy", "memory", "-o", f"{i}.json")
            for i, solver in enumerate(["cbc", "highs", "cbc", "highs"])
        ]
        done = [run.result() for run in runs]
    assert [run.code for run in done] == [0, 0, 0, 0], [run.err for run in done]
    plans = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(4)]
    assert plans[0] == plans[2]
    assert plans[1] == plans[3]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i}.json" for i in range(4)]
