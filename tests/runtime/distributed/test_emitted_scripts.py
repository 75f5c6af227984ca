"""The scripts of `llamaplan emit --for torchrun`, run for real: two "hosts" on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from jobs import PROMPT

from exporter import export
from exporter.emit import emit
from runtime.prepared import prepare_session
from runtime.reading.opening import open_source
from runtime.session import load_session
from tests.exporter.export_helpers import make_plan
from tests.runtime.distributed.nursery import ENVIRONMENT


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def test_two_hosts_with_only_their_own_bundles_write_the_text_of_one_process(shipped: Path, tmp_path: Path) -> None:
    plan = make_plan(
        shipped, [2, 4, 1], devices=["a-cpu0", "a-cpu1", "b-cpu"], hosts=["127.0.0.1", "127.0.0.1", "localhost"]
    )
    export(plan, model=shipped, output=tmp_path / "whole")
    for name, stages in (("127.0.0.1", {0, 1}), ("localhost", {2})):
        (tmp_path / name).mkdir()
        export(plan, model=shipped, output=tmp_path / name / "shards", stages=stages)
    key = tmp_path / "key"
    key.write_text("correct horse battery")
    key.chmod(0o600)
    environment = {
        **ENVIRONMENT,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LLAMARUN_KEY_FILE": str(key),
        "LLAMARUN_PORT": free_port(),
        "MASTER_PORT": free_port(),
    }
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    options = {"127.0.0.1": ["-p", PROMPT, "-n", "12", "--temp", "0", "-q", "--speed", "reference"], "localhost": []}
    running = [
        subprocess.Popen(
            ["sh", "-s", "--", *options[host]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path / host,
            env=environment,
            text=True,
        )
        for host in options
    ]
    scripts = emit(plan, engine="torchrun", directory="shards").files
    for host, process in zip(options, running, strict=True):
        process.stdin.write(scripts[f"launch-{host}.sh"])
        process.stdin.close()
        process.stdin = None
    (out, said), (_, other) = [process.communicate(timeout=150) for process in running]
    assert [process.returncode for process in running] == [0, 0], said + other
    assert out == in_one_process(tmp_path / "whole")


def in_one_process(folder: Path) -> str:
    from runtime.engine.run import generate_requests
    from runtime.generate.limits import Limits
    from runtime.generate.request import Request
    from runtime.generate.sampling import Sampling

    session = load_session(prepare_session(open_source(folder, model=None), device_map={0: "cpu", 1: "cpu", 2: "cpu"}))
    prepared = session.prepared
    limits = Limits(context_tokens=64, max_tokens=12, eos_token_ids=prepared.eos_token_ids)
    request = Request(prompt_ids=prepared.tokenizer(PROMPT).input_ids, sampling=Sampling(), limits=limits)
    return generate_requests(session, [request], decode=prepared.decode).sequences[0].text + "\n"
