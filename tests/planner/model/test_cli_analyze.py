"""`llamaplan analyze` and `devices` as a person meets them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from planner.devices.catalogue import CATALOGUE
from plans.cluster import Cluster
from plans.profile import ModelProfile
from tests.conftest import RunCommand
from tests.planner.cases import TINY, tiny_profile

EXAMPLES = Path(__file__).parents[3] / "plans" / "examples"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(TINY))
    return path


def test_analyze_prints_a_table_on_stdout_and_the_next_command_on_stderr(
    shipped: Path, run_command: RunCommand
) -> None:
    done = run_command("llamaplan", "analyze", shipped)
    assert done.code == 0
    assert "layers 0-6" in done.out
    assert "3,541,824" in done.out
    assert f"next: llamaplan solve {shipped} -o plan.json" in done.err


def test_nothing_in_the_table_is_cut_off_at_eighty_columns(run_command: RunCommand, tmp_path: Path) -> None:
    largest = TINY | {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }
    (tmp_path / "config.json").write_text(json.dumps(largest))
    done = run_command("llamaplan", "analyze", tmp_path / "config.json", "-c", "131072")
    assert "405,853,388,800" in done.out
    table = done.out.splitlines()[1:7]
    assert all(len(line) <= 80 and "…" not in line for line in table)


def test_quiet_leaves_the_data_and_takes_the_hint(config: Path, run_command: RunCommand) -> None:
    done = run_command("llamaplan", "analyze", config, "-q")
    assert "layers 0-3" in done.out
    assert done.err == ""


def test_json_holds_the_profile_and_what_the_options_asked(config: Path, run_command: RunCommand) -> None:
    done = run_command("llamaplan", "analyze", config, "--json", "-c", "100", "--batch-size", "3", "--dtype", "float32")
    found = json.loads(done.out)
    profile = tiny_profile()
    assert found["total_parameters"] == profile.total_parameters
    assert found["dtype"] == "fp32"
    assert found["memory"]["weight_bytes"] == 4 * profile.total_parameters
    assert found["memory"]["kv_cache_bytes"] == 3 * 100 * 4 * 2 * 2 * 8 * 4
    assert [unit["kind"] for unit in found["units"]] == ["embedding", *["layer"] * 4, "head"]


def test_output_writes_the_profile_and_twice_the_same_bytes(
    config: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    for name in ("one.json", "two.json"):
        assert run_command("llamaplan", "analyze", config, "-o", tmp_path / name).code == 0
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert ModelProfile.read(tmp_path / "one.json").total_parameters == tiny_profile().total_parameters
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--dtype", "int4"), 2, "--dtype 'int4' is not known"),
        (("--kv-cache-dtype", "fp8"), 2, "--kv-cache-dtype 'fp8' is not known"),
        (("-c", "0"), 2, "--ctx-size is 0"),
        (("-c", "-5"), 2, "--ctx-size is -5"),
        (("-c", "3.5"), 2, "--ctx-size"),
        (("--batch-size", "0"), 2, "--batch-size"),
        (("-o", "no/such/folder/x.json"), 6, "no/such/folder/x.json: cannot write"),
        (("--fast",), 2, "--fast"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_clear_sentence(
    arguments: tuple[str, ...], code: int, message: str, config: Path, run_command: RunCommand
) -> None:
    done = run_command("llamaplan", "analyze", config, *arguments)
    assert done.code == code
    assert done.err.startswith("error[E-")
    assert len(done.err.splitlines()) == 1
    assert message in done.err
    assert done.out == ""


def test_a_result_is_never_written_into_the_checkpoint(shipped: Path, run_command: RunCommand) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in shipped.iterdir()}
    done = run_command("llamaplan", "analyze", shipped, "-o", shipped / "config.json")
    assert done.code == 2
    assert "inside the checkpoint" in done.err
    assert {path.name: path.stat().st_mtime_ns for path in shipped.iterdir()} == before


def test_custom_code_in_a_checkpoint_is_ignored_and_said(config: Path, run_command: RunCommand) -> None:
    from tests.planner.model.test_profile import tensors_of, write_checkpoint

    folder = write_checkpoint(config.parent, tensors_of(), TINY | {"auto_map": {"AutoModel": "evil.Model"}})
    (folder / "evil.py").write_text("raise SystemExit('run')")
    done = run_command("llamaplan", "analyze", folder)
    assert done.code == 0
    assert "warning: the checkpoint brings Python code of its own" in done.err


@pytest.mark.parametrize("name", ["with space", "ümlaut", "semi;colon", "new\nline", "-dash", "it's"])
def test_odd_paths_work_and_the_hint_quotes_them(name: str, run_command: RunCommand, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    done = run_command("llamaplan", "analyze", folder / "config.json", "--json")
    assert done.code == 0
    assert json.loads(done.out)["model"]["name"]


def test_devices_shows_this_machine_and_writes_a_cluster(run_command: RunCommand, tmp_path: Path) -> None:
    done = run_command("llamaplan", "devices", "-o", tmp_path / "cluster.json")
    assert done.code == 0
    assert "cpu" in done.out
    assert "--cluster" in done.err
    cluster = Cluster.read(tmp_path / "cluster.json")
    assert all(device.budget_bytes for device in cluster.devices)


def test_devices_describes_a_cluster_with_its_links(run_command: RunCommand) -> None:
    done = run_command("llamaplan", "devices", "--cluster", EXAMPLES / "lab.json", "--margin", "mini/cpu=1GiB")
    assert done.code == 0
    assert "9.07 ms" in done.out


def test_devices_as_json_is_the_cluster_in_bytes(run_command: RunCommand) -> None:
    done = run_command("llamaplan", "devices", "--device", "cpu=1GB", "--device", "cpu=1GiB", "--json")
    budgets = {device["name"]: device["budget_bytes"] for device in json.loads(done.out)["devices"]}
    assert budgets == {"cpu#0": 10**9, "cpu#1": 2**30}


def test_the_catalogue_is_listed(run_command: RunCommand) -> None:
    done = run_command("llamaplan", "devices", "--catalogue")
    assert all(entry.name in done.out for entry in CATALOGUE)
    listed = json.loads(run_command("llamaplan", "devices", "--catalogue", "--json").out)
    assert [entry["name"] for entry in listed] == [entry.name for entry in CATALOGUE]
    assert run_command("llamaplan", "devices", "--catalogue", "--device", "cpu").code == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": []}, "/devices"),
        ({"name": "cpu"}, "two devices are called cpu"),
        ({"memory_bytes": 0}, "/devices/1/memory_bytes"),
        ({"memory_bytes": -1}, "/devices/1/memory_bytes"),
        ({"memory_bytes": "80 GB of memory"}, "is not a size"),
        ({"memory_bytes": 80.5}, "/devices/1/memory_bytes"),
        ({"memory_bytes": True}, "/devices/1/memory_bytes"),
        ({"memory_bytes": 2**61}, "/devices/1/memory_bytes"),
        ({"memory_bandwidth_bytes_per_second": 0}, "memory_bandwidth_bytes_per_second"),
        ({"memory_bandwidth_bytes_per_second": 1e-6}, "memory bandwidths differ by more than 1e+09: 1e-06"),
        ({"flops_per_second": {"fp32": 1.0}}, "compute rates differ by more than"),
        ({"flops_per_second": {}}, "names no dtype"),
        ({"flops_per_second": {"int4": 1.0}}, "/devices/1/flops_per_second"),
        ({"budget_bytes": 2**31}, "exceed memory_bytes"),
        ({"host": "elsewhere"}, "which is not listed"),
        ({"extra": 1}, "/devices/1/extra"),
        ({"links": [{"from": "cpu", "to": "cpu", "bandwidth_bytes_per_second": 1e9, "latency_seconds": 0}]}, "itself"),
        (
            {"links": [{"from": "cpu", "to": "nowhere", "bandwidth_bytes_per_second": 1e9, "latency_seconds": 0}]},
            "nowhere",
        ),
        (
            {"links": [{"class": "same_host", "bandwidth_bytes_per_second": -1, "latency_seconds": 0}]},
            "bandwidth_bytes_per_second",
        ),
        (
            {"links": [{"class": "same_host", "bandwidth_bytes_per_second": 1, "latency_seconds": -1}]},
            "latency_seconds",
        ),
        ({"links": [{"from": "cpu", "bandwidth_bytes_per_second": 1, "latency_seconds": 0}]}, "from and to, or class"),
        ({"hosts": [{"name": "local", "address": "host:70000"}]}, "70000"),
        ({"hosts": [{"name": "local", "address": "host:0"}]}, "port 0"),
        ({"hosts": [{"name": "local", "address": "not a host!"}]}, "is not a host name"),
    ],
    ids=str,
)
def test_a_cluster_file_that_makes_no_sense_is_refused_at_its_pointer(
    change: dict[str, object], message: str, run_command: RunCommand, tmp_path: Path
) -> None:
    rates = {"memory_bandwidth_bytes_per_second": 1e10, "flops_per_second": {"fp32": 1e11}}
    first = {"name": "cpu", "kind": "cpu", "memory_bytes": "1GiB", **rates}
    second = first | {"name": "gpu", "kind": "cuda"}
    document: dict[str, object] = {"schema_version": 1, "devices": [first, second], "hosts": [{"name": "local"}]}
    top = {key: value for key, value in change.items() if key in ("devices", "links", "hosts")}
    document |= {"devices": [first, second | {k: v for k, v in change.items() if k not in top}]}
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(document | top))
    done = run_command("llamaplan", "devices", "--cluster", path)
    assert done.code == 3
    assert len(done.err.splitlines()) == 1
    assert message in done.err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"{", ":1:2"),
        (b"[" * 10_000, "levels"),
        (b'{"devices": NaN}', "NaN"),
        (b'{"hosts": [], "hosts": []}', "duplicate key"),
    ],
)
def test_a_cluster_file_that_is_no_strict_json_is_refused(
    data: bytes, message: str, run_command: RunCommand, tmp_path: Path
) -> None:
    (tmp_path / "cluster.json").write_bytes(data)
    done = run_command("llamaplan", "devices", "--cluster", tmp_path / "cluster.json")
    assert done.code == 3
    assert message in done.err


def test_help_and_analyze_stay_light() -> None:
    for arguments, forbidden in (
        (["--help"], {"torch", "transformers", "pulp", "highspy", "networkx", "numpy"}),
        (["analyze", "tests/checkpoint/python-llama", "-q"], {"torch", "transformers", "pulp", "networkx", "numpy"}),
        (["devices", "--device", "cpu=1GiB", "-q"], {"torch", "transformers", "pulp", "numpy"}),
    ):
        code = (
            f"import sys; sys.argv = ['llamaplan', *{arguments!r}]\n"
            "from planner.cli import main\n"
            "try:\n    main()\nexcept SystemExit as left:\n    assert not left.code\n"
            "print('\\n'.join(sys.modules), file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=EXAMPLES.parents[1]
        )
        assert not forbidden & {name.split(".")[0] for name in done.stderr.splitlines()}, arguments


def test_a_stdout_that_is_closed_ends_quietly(config: Path) -> None:
    command = f"{sys.executable} -c 'from planner.cli import main; main()' analyze {config} --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=EXAMPLES.parents[1], check=False)
    assert "Traceback" not in done.stderr


def test_a_path_that_is_no_utf8_works(config: Path) -> None:
    folder = os.fsencode(config.parent) + b"\xff"
    os.rename(config.parent, folder)  # noqa: PTH104 - bytes
    done = subprocess.run(
        [sys.executable, "-c", "from planner.cli import main; main()", "analyze", folder + b"/config.json", "--json"],
        capture_output=True,
        cwd=EXAMPLES.parents[1],
        check=True,
    )
    assert json.loads(done.stdout)["model"]["name"] == "tiny\\udcff"
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="root plays another user; another user is one already")
@pytest.mark.parametrize("path", ["config.json", "model.safetensors", "."])
def test_what_may_not_be_read_is_named_with_its_errno(
    path: str, run_command: RunCommand, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.planner.model.test_profile import tensors_of, write_checkpoint

    folder = write_checkpoint(tmp_path / "tiny", tensors_of())
    ours = tmp_path_factory.getbasetemp().parent
    if "PYTEST_XDIST_WORKER" in os.environ:  # the folder of one of several workers lies one deeper
        ours = ours.parent
    for parent in (tmp_path, *tmp_path.parents):
        if parent.is_relative_to(ours):
            parent.chmod(0o755)
    (folder / path).chmod(0)
    os.seteuid(65534)
    try:
        done = run_command("llamaplan", "analyze", folder)
    finally:
        os.seteuid(0)
    assert done.code == 6
    assert "errno 13" in done.err
    assert str(folder / path) in done.err
