"""A short run of every reader over mutated inputs, and what long runs found; see README.md for those."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from plans.errors import InputError
from tests.conftest import RunCommand
from tests.hostile.fuzz import WINGS, fuzz
from tests.hostile.fuzz_reader import READERS, Reader, judge, made
from tests.planner.cases import TINY, make_plan
from tests.planner.measure.test_calibrate import document

INPUTS = 200
DIGITS = "9" * 5000  # more than int() takes

MANY_STEPS = {
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 600},
    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
}
FOUND: list[tuple[str, bytes]] = [
    ("margins", b"1e999999999%"),  # Fraction computes that power
    ("margins", b"1e-999999999%"),
    ("device_maps", f"{DIGITS}=cpu".encode()),
    ("device_maps", b"0=cuda:-1"),
    ("device_maps", b"0=cuda:128"),  # torch keeps eight bits
    ("device_maps", b"0=cuda:256"),
    ("partitions", b'accelerate:{"": "cuda:%s"}' % DIGITS.encode()),
    ("partitions", 'accelerate:{"\ud800": 0}'.encode("utf-8", "surrogatepass")),
    ("pins", "\u0663@cpu".encode()),
    ("models", b"~nobody-has-this-name/model"),
    ("models", b"~\0"),
    ("control_messages", b'{"kind": [%s]}' % b", ".join([b"[[0, 0], [0, 0]]"] * 200_000)),  # an error would quote it
    ("cluster", b'{"devices": [%s]}' % b", ".join([b"{}"] * 400_000)),  # seven errors each
    ("cluster", b'{"devices": [], %s}' % b", ".join(b'"%d": 0' % i for i in range(400_000))),
    ("cluster", b'{"links": [%s]}' % b", ".join([b'{"x": {"x": []}}'] * 600_000)),
    ("run", json.dumps(document(make_plan().profile, batch_size=100_000)).encode()),
    ("run", json.dumps(document(make_plan().profile, new_tokens=2**40)).encode()),
    ("run", json.dumps(document(make_plan().profile, prompt_tokens=2**31)).encode()),
    ("model_config", json.dumps(TINY | {"hidden_act": -1}).encode()),
    ("model_config", json.dumps(TINY | {"eos_token_id": 1.5}).encode()),
    ("generation", json.dumps({"stop_strings": "a" * 40_000}).encode()),
    ("generation", json.dumps({"stop_strings": ["x"] * 40_000}).encode()),
    ("tokenizer", b'tokenizer.json\n{"model": {"vocab": {"a": 0}}, "added_tokens": 5}'),
    ("tokenizer", b"tokenizer.json\n" + json.dumps(MANY_STEPS).encode()),
    ("tokenizer", b'tokenizer_config.json\n{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": []}'),
]


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reader]:
    """Readers, each opened once."""
    opened: dict[str, Reader] = {}

    def find(name: str) -> Reader:
        if name not in opened:
            opened[name] = READERS[name](tmp_path_factory.mktemp(name))
        return opened[name]

    return find


@pytest.mark.parametrize("name", READERS)
def test_mutated_inputs_are_read_or_refused_quickly_and_by_name(name: str) -> None:
    assert fuzz(name, inputs=INPUTS, seed=1).faults == []


@pytest.mark.parametrize(("name", "data"), FOUND, ids=[f"{name}-{i}" for i, (name, _data) in enumerate(FOUND)])
def test_an_input_that_a_long_run_found_is_refused(ways: Callable[[str], Reader], name: str, data: bytes) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        verdict = judge(ways(name), data)
    assert not verdict.fault
    assert not verdict.is_accepted


@pytest.mark.parametrize("option", ["--prompt-ids", "--in-flight"])
def test_a_number_of_5000_digits_is_a_mistake_in_usage(shipped: Path, run_command: RunCommand, option: str) -> None:
    command = "generate" if option == "--prompt-ids" else "bench"
    found = run_command("llamarun", command, shipped, option, DIGITS)
    assert found.code == 2
    assert option in found.err


def test_an_input_depends_on_seed_and_number_alone(ways: Callable[[str], Reader]) -> None:
    first, again = (made("cluster", ways("cluster"), seed=3, number=7) for _ in range(2))
    assert first == again
    assert made("cluster", ways("cluster"), seed=3, number=8) != first
    assert made("cluster", ways("cluster"), seed=4, number=7) != first


def _refuse(data: bytes) -> None:
    raise InputError(data.decode("latin-1"), where="x")


@pytest.mark.parametrize(
    ("read", "bounds", "fault"),
    [
        (_refuse, {}, ""),
        (len, {}, ""),
        (json.loads, {}, "UnicodeDecodeError"),
        (lambda data: {}[data], {}, "KeyError"),
        (lambda _data: sum(range(10**6)), {"max_seconds": 0.0}, "took"),
        (lambda _data: len(bytes(range(256)) * (1 << 20)), {"max_extra_bytes": 32 << 20}, "needed"),
    ],
)
def test_the_judge_sees_what_is_no_refusal(read: Callable[[bytes], object], bounds: dict, fault: str) -> None:
    verdict = judge(Reader(make=lambda _rng: b"", read=read, **bounds), b"\xff\x1b")
    assert verdict.fault[: len(fault)] == fault
    assert bool(verdict.fault) == bool(fault)


def test_every_wing_brings_readers() -> None:
    assert {READERS[name].__module__ for name in READERS} == {wing.__name__ for wing in WINGS}
