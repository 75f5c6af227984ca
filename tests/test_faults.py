"""The faults table: every bad input a command can meet, what a person sees, and the exit code.

Each row says what is broken, which command meets it, and what must come out: one `error[E-...]` line without a
traceback, the documented exit code, and nothing left behind or changed. Row ids are those of `docs/faults.md`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SHIPPED, RunCommand

INPUT, USAGE, INFEASIBLE, INTEGRITY, MACHINE, NUMERICAL = 3, 2, 4, 5, 6, 8

Prepare = Callable[[Path], list[object]]
"""Prepare a folder and return the command line that meets the fault; `tmp/model` is a copy of the checkpoint."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    id: str
    what: str
    prepare: Prepare
    code: int
    says: str


ROWS: list[Row] = []


def row(row_id: str, what: str, code: int, says: str) -> Callable[[Prepare], Prepare]:
    """Register a function as a row."""

    def register(prepare: Prepare) -> Prepare:
        ROWS.append(Row(row_id, what, prepare, code, says))
        return prepare

    return register


def rows(row_id: str, code: int, cases: dict[str, tuple[Prepare, str]]) -> None:
    """Register several variants of a row."""
    for what, (prepare, says) in cases.items():
        ROWS.append(Row(row_id, what, prepare, code, says))


# --- helpers that break things -------------------------------------------------------------------------------------


def model_in(tmp: Path) -> Path:
    return tmp / "model"


def edit_config(**changes: Any) -> Prepare:
    def prepare(tmp: Path) -> list[object]:
        path = model_in(tmp) / "config.json"
        config = json.loads(path.read_text())
        config.update(changes)
        path.write_text(json.dumps(config))
        return ["llamaplan", "analyze", model_in(tmp)]

    return prepare


def write_config(data: bytes) -> Prepare:
    def prepare(tmp: Path) -> list[object]:
        (model_in(tmp) / "config.json").write_bytes(data)
        return ["llamaplan", "analyze", model_in(tmp)]

    return prepare


def edit_index(change: Callable[[dict[str, str]], None]) -> Prepare:
    def prepare(tmp: Path) -> list[object]:
        path = model_in(tmp) / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))
        return ["llamaplan", "analyze", model_in(tmp)]

    return prepare


def first_tensor_goes_to(file: str) -> Prepare:
    def change(weight_map: dict[str, str]) -> None:
        weight_map[next(iter(weight_map))] = file

    return edit_index(change)


def edit_plan(change: Callable[[dict[str, Any]], None], *command: str) -> Prepare:
    def prepare(tmp: Path) -> list[object]:
        path = tmp / "plan.json"
        plan = json.loads(path.read_text())
        change(plan)
        path.write_text(json.dumps(plan))
        return ["llamaplan", *(command or ("show",)), path]

    return prepare


def edit_stage(index: int, **changes: Any) -> Prepare:
    return edit_plan(lambda plan: plan["stages"][index].update(changes))


def write_plan(data: bytes) -> Prepare:
    def prepare(tmp: Path) -> list[object]:
        (tmp / "plan.json").write_bytes(data)
        return ["llamaplan", "show", tmp / "plan.json"]

    return prepare


def plan_text(tmp: Path) -> str:
    return (tmp / "plan.json").read_text()


def break_bundle(change: Callable[[Path], None]) -> Prepare:
    def prepare(tmp: Path) -> list[object]:
        change(tmp / "shards")
        return ["llamarun", "generate", tmp / "shards", "-p", "x", "-n", "1"]

    return prepare


def generate(*arguments: object) -> Prepare:
    return lambda tmp: ["llamarun", "generate", tmp / "shards", *arguments]


def solve(*arguments: object) -> Prepare:
    return lambda tmp: ["llamaplan", "solve", model_in(tmp), "-o", tmp / "new.json", *arguments]


def flip_bit(path: Path, *, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def swap(first: Path, second: Path) -> None:
    aside = first.with_suffix(".aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


# --- C: checkpoint directory ---------------------------------------------------------------------------------------

rows(
    "C1",
    INPUT,
    {
        "path missing": (lambda tmp: ["llamaplan", "analyze", tmp / "nowhere"], "nowhere"),
        "path is a file": (lambda tmp: ["llamaplan", "analyze", tmp / "model" / "tokenizer.json"], "tokenizer.json"),
    },
)


@row("C1", "empty folder", INPUT, "config.json")
def _(tmp: Path) -> list[object]:
    (tmp / "empty").mkdir()
    return ["llamaplan", "analyze", tmp / "empty"]


rows(
    "C3",
    INPUT,
    {
        "config empty": (write_config(b""), "empty"),
        "config truncated": (write_config(b'{"model_type": "llama",\n "hidden'), ":2:"),
        "config not UTF-8": (write_config(b'{"a": "\xff"}'), "UTF-8"),
        "config UTF-16": (write_config('{"a": 1}'.encode("utf-16")), "byte-order mark"),
        "config with BOM": (write_config(b"\xef\xbb\xbf{}"), "byte-order mark"),
    },
)
rows(
    "C4",
    INPUT,
    {
        "duplicate key": (write_config(b'{"hidden_size": 1, "hidden_size": 2}'), "hidden_size"),
        "NaN": (write_config(b'{"rope_theta": NaN}'), "NaN"),
        "overflow": (write_config(b'{"rope_theta": 1e999}'), "1e999"),
        "a number of 5000 digits": (write_config(b'{"hidden_size": ' + b"1" * 5000 + b"}"), "too large"),
        "100,000 levels": (write_config(b"[" * 100_000), "levels"),
    },
)


@row("C5", "config of 200 MB", INPUT, "209715200")
def _(tmp: Path) -> list[object]:
    with (model_in(tmp) / "config.json").open("wb") as file:
        file.truncate(200 << 20)  # sparse: refused by its size, before anything is read
    return ["llamaplan", "analyze", model_in(tmp)]


for bad in (0, -1, 10**9, 32.0, "32", True, None):
    rows("C6", INPUT, {f"num_hidden_layers {bad!r}": (edit_config(num_hidden_layers=bad), "num_hidden_layers")})
rows(
    "C7",
    INPUT,
    {
        "heads do not divide hidden size": (edit_config(num_attention_heads=7, head_dim=None), "hidden_size 192"),
        "kv heads do not divide heads": (edit_config(num_key_value_heads=4), "num_attention_heads 6"),
        "head_dim contradicts the weights": (edit_config(head_dim=33), "shape"),
    },
)


@row("C8", "family outside the allow-list, given to the runtime", INPUT, "not supported")
def _(tmp: Path) -> list[object]:
    edit_config(model_type="gpt2")(tmp)
    return ["llamarun", "generate", model_in(tmp), "-p", "x", "-n", "1"]


@row("C8", "quantised weights, given to the runtime", INPUT, "quantised")
def _(tmp: Path) -> list[object]:
    edit_config(quantization_config={"quant_method": "gptq", "bits": 4})(tmp)
    return ["llamarun", "generate", model_in(tmp), "-p", "x", "-n", "1"]


rows(
    "C10",
    INPUT,
    {
        "unknown rope type": (edit_config(rope_parameters={"rope_type": "spiral"}), "spiral"),
        "negative factor": (edit_config(rope_parameters={"rope_type": "linear", "factor": -2.0}), "factor"),
        "missing factor": (edit_config(rope_parameters={"rope_type": "yarn"}), "factor"),
    },
)
for name in ("../x", "/etc/passwd", "a/b", "..\\x", "x\0y", "", "x" * 300, "x.safetensors.", "x ", "cafe\u0301"):
    rows("C13", INPUT, {f"index names {name[:12]!r}": (first_tensor_goes_to(name), "NUL" if "\0" in name else "name")})


@row("C14", "shard is a FIFO", INPUT, "not a regular file")
def _(tmp: Path) -> list[object]:
    shard = sorted(model_in(tmp).glob("*.safetensors"))[0]
    shard.unlink()
    os.mkfifo(shard)
    return ["llamaplan", "analyze", model_in(tmp)]


@row("C14", "shard is a folder", INPUT, "not a regular file")
def _(tmp: Path) -> list[object]:
    shard = sorted(model_in(tmp).glob("*.safetensors"))[0]
    shard.unlink()
    shard.mkdir()
    return ["llamaplan", "analyze", model_in(tmp)]


@row("C15", "a listed shard is missing", INPUT, "missing")
def _(tmp: Path) -> list[object]:
    sorted(model_in(tmp).glob("*.safetensors"))[1].unlink()
    return ["llamaplan", "analyze", model_in(tmp)]


rows(
    "C15",
    INPUT,
    {
        "a shard holds a tensor the index lacks": (edit_index(lambda m: m.pop("model.norm.weight")), "model.norm"),
        "the index maps to the wrong shard": (
            edit_index(lambda m: m.update({"model.norm.weight": m["model.embed_tokens.weight"]})),
            "model.norm",
        ),
    },
)


def without(tmp: Path, *names: str) -> Path:
    """Write the checkpoint again as one file without some tensors."""
    from safetensors.torch import load_file, save_file

    model = model_in(tmp)
    tensors: dict[str, Any] = {}
    for shard in sorted(model.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (model / "model.safetensors.index.json").unlink()
    kept = {name: tensor for name, tensor in tensors.items() if not any(name.startswith(part) for part in names)}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    return model


@row("C23", "no lm_head in an untied model", INPUT, "lm_head")
def _(tmp: Path) -> list[object]:
    return ["llamaplan", "analyze", without(tmp, "lm_head")]


@row("C24", "a layer is missing", INPUT, "layer 3")
def _(tmp: Path) -> list[object]:
    return ["llamaplan", "analyze", without(tmp, "model.layers.3.")]


rows(
    "C24",
    INPUT,
    {
        "more layers than config says": (edit_config(num_hidden_layers=6), "layer 6"),
        "a shape contradicts config": (edit_config(intermediate_size=511), "511"),
    },
)

# --- K: tokenizer and prompt templates -----------------------------------------------------------------------------


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def generate_model(*arguments: object) -> Prepare:
    return lambda tmp: ["llamarun", "generate", model_in(tmp), *arguments]


def break_tokenizer(change: Callable[[Path], object]) -> Prepare:
    def prepare(tmp: Path) -> list[object]:
        change(model_in(tmp) / "tokenizer.json")
        return generate_model("-p", "x", "-n", "1")(tmp)

    return prepare


def set_vocab(**ids: int) -> Prepare:
    return break_tokenizer(lambda path: change_json(path, lambda t: t["model"]["vocab"].update(ids)))


rows(
    "K1",
    INPUT,
    {
        "tokenizer missing": (break_tokenizer(lambda path: path.unlink()), "tokenizer.json"),
        "tokenizer empty": (break_tokenizer(lambda path: path.write_bytes(b"")), "tokenizer.json"),
        "tokenizer null": (break_tokenizer(lambda path: path.write_bytes(b"null")), "tokenizer.json"),
        "tokenizer truncated": (
            break_tokenizer(lambda path: os.truncate(path, path.stat().st_size // 2)),
            "tokenizer.json",
        ),
        "tokenizer of 500 MB": (break_tokenizer(lambda path: os.truncate(path, 500 << 20)), "524288000"),
        "tokenizer of an unknown kind": (
            break_tokenizer(lambda path: change_json(path, lambda t: t["model"].update(type="Magic"))),
            "tokenizer",
        ),
    },
)
rows(
    "K2",
    INPUT,
    {
        "token id beyond the vocabulary": (set_vocab(zzzz=2048), "2048"),
        "token id 2^32 - 1": (set_vocab(zzzz=2**32 - 1), "4294967295"),
        "two tokens with one id": (set_vocab(zzzz=100), "share an id"),
    },
)


def set_eos(value: object) -> Prepare:
    def prepare(tmp: Path) -> list[object]:
        change_json(model_in(tmp) / "generation_config.json", lambda config: config.update(eos_token_id=value))
        return generate_model("-p", "x", "-n", "1")(tmp)

    return prepare


for value in ("</s>", [2, "</s>"], 1.5):
    rows("K3", INPUT, {f"eos {value}": (set_eos(value), "eos_token_id")})


@row("K4", "more tokens than embedding rows", INPUT, "0 to 1999")
def _(tmp: Path) -> list[object]:
    from safetensors.torch import load_file, save_file

    model = without(tmp, "nothing")
    tensors = load_file(model / "model.safetensors")
    narrow = {n: t[:2000].clone() if "embed_tokens" in n or "lm_head" in n else t for n, t in tensors.items()}
    save_file(narrow, model / "model.safetensors", metadata={"format": "pt"})
    edit_config(vocab_size=2000)(tmp)
    return generate_model("-p", "x", "-n", "1")(tmp)


def set_template(text: str | None) -> Prepare:
    def prepare(tmp: Path) -> list[object]:
        path = model_in(tmp) / "chat_template.jinja"
        path.unlink()
        if text is not None:
            path.write_text(text)
        return ["llamarun", "chat", model_in(tmp)]

    return prepare


rows(
    "K5",
    INPUT,
    {
        "no chat template": (set_template(None), "llamarun generate"),
        "template reaches for the interpreter": (
            set_template("{{ cycler.__init__.__globals__.os.system('touch owned') }}"),
            "unsafe",
        ),
        "template writes 10 GB": (set_template("{{ 'a' * 10000000000 }}"), "MiB"),
        "template loops for hours": (
            set_template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
            "longer than",
        ),
        "template is malformed": (set_template("{% if %}"), "template"),
        "template refuses": (set_template("{{ raise_exception('no thanks') }}"), "no thanks"),
    },
)
rows(
    "K6",
    INTEGRITY,
    {
        "tokenizer of another model in an export": (
            break_bundle(lambda d: change_json(d / "tokenizer.json", lambda t: t["model"]["merges"].pop())),
            "tokenizer.json",
        )
    },
)

# --- X: values on the command line ---------------------------------------------------------------------------------

rows(
    "X1",
    USAGE,
    {
        "unknown option": (lambda tmp: ["llamaplan", "analyze", tmp / "model", "--fast"], "--fast"),
        "missing argument": (lambda _: ["llamaplan", "analyze"], "MODEL"),
        "unknown command": (lambda _: ["llamarun", "dance"], "dance"),
        "conflicting options": (solve("--device", "cpu=1GiB", "--cluster", "x.json"), "--cluster"),
        "two prompts": (generate("-p", "x", "--file", "y"), "prompt"),
        "no prompt": (generate("-n", "1"), "prompt"),
    },
)
for value in ("-1", "1000000000", "3.5", ""):
    rows("X2", USAGE, {f"--max-tokens {value!r}": (generate("-p", "x", "--max-tokens", value), "--max-tokens")})
for option, values in {
    "--temp": ("-1", "nan", "inf"),
    "--top-p": ("0", "1.1"),
    "--top-k": ("-1", "1000000"),
    "--seed": ("-1", str(2**64), "1.5"),
}.items():
    for value in values:
        row_id = "X4" if option == "--seed" else "X3"
        rows(row_id, USAGE, {f"{option} {value}": (generate("-p", "x", "-n", "1", option, value), option[2:])})
rows(
    "X5",
    INPUT,
    {"a path of 5000 characters": (lambda tmp: ["llamaplan", "analyze", tmp / ("x" * 5000)], "xxx")},
)
rows(
    "X8",
    USAGE,
    {
        "output is the checkpoint": (
            lambda tmp: ["llamaplan", "export", tmp / "plan.json", "--model", tmp / "model", "-o", tmp / "model"],
            "model",
        ),
        "output inside the checkpoint": (
            lambda tmp: ["llamaplan", "export", tmp / "plan.json", "--model", tmp / "model", "-o", tmp / "model/out"],
            "model",
        ),
        "output is the checkpoint's parent": (
            lambda tmp: ["llamaplan", "export", tmp / "plan.json", "--model", tmp / "model", "-o", tmp],
            "model",
        ),
    },
)


def simulate(*arguments: object) -> Prepare:
    return lambda tmp: ["llamaplan", "simulate", tmp / "plan.json", *arguments]


def simulate_record(data: bytes) -> Prepare:
    def prepare(tmp: Path) -> list[object]:
        (tmp / "record.jsonl").write_bytes(data)
        return simulate("--arrivals", tmp / "record.jsonl")(tmp)

    return prepare


for option, values in {
    "--requests": ("0", "-1", "1e9", "100001"),
    "--rate": ("0", "-1", "nan", "inf"),
    "--in-flight": ("0", "65537"),
    "--seed": ("-1", str(2**64)),
    "--prompt-tokens": ("0", "100000"),
    "--max-tokens": ("0", "100000"),
}.items():
    for value in values:
        rows("X7", USAGE, {f"simulate {option} {value}": (simulate(option, value), "")})
rows(
    "X1",
    USAGE,
    {
        "a recorded file and a rate": (simulate("--arrivals", "record.jsonl", "--rate", "1"), "--rate"),
        "a trace over the plan": (lambda tmp: simulate("--trace", tmp / "plan.json")(tmp), "--trace"),
    },
)
rows("L9", INFEASIBLE, {"more requests in flight than there is room for": (simulate("--in-flight", "60000"), "cpu#")})
rows(
    "L5",
    INPUT,
    {
        "no recorded file": (simulate("--arrivals", "normal"), "normal"),
        "an empty record": (simulate_record(b"\n\n"), "no request"),
        "a record that is not JSON": (simulate_record(b'{"prompt_tokens": 1, "new_tokens": 1}\n{'), ":2"),
        "a record with an unknown key": (simulate_record(b'{"prompt_tokens": 1, "new_tokens": 1, "x": 1}'), "/x"),
        "a record before its start": (
            simulate_record(b'{"prompt_tokens": 1, "new_tokens": 1, "arrival_seconds": -1}'),
            "/arrival_seconds",
        ),
        "a record of a request without tokens": (simulate_record(b'{"prompt_tokens": 1, "new_tokens": 0}'), "new_tok"),
    },
)

# --- L: plans and the solver ---------------------------------------------------------------------------------------

rows(
    "L1",
    INPUT,
    {
        "overlap": (edit_stage(1, start_layer=0), "/stages/1"),
        "gap": (edit_stage(1, start_layer=4), "/stages/1"),
        "reversed": (edit_stage(0, end_layer=0, start_layer=2), "/stages/0"),
        "duplicate stage": (edit_plan(lambda p: p["stages"].insert(1, p["stages"][0])), "/stages/"),
        "out of range": (edit_stage(2, end_layer=99), "/stages/2"),
        "device twice": (edit_stage(1, device="cpu#0"), "/stages/1/device"),
        "no stages": (edit_plan(lambda p: p["stages"].clear()), "/stages"),
    },
)
rows(
    "L3",
    INPUT,
    {
        f"version {value!r}": (edit_plan(lambda p, value=value: p.update(schema_version=value)), "/schema_version")
        for value in (0, 2, "1", 1.0, None)
    },
)
rows(
    "L4",
    INPUT,
    {
        "unknown key": (edit_plan(lambda p: p.update(extra=1)), "/extra"),
        "missing key": (edit_plan(lambda p: p.pop("workload")), "/workload"),
        "wrong type": (edit_plan(lambda p: p.update(strategy=3)), "/strategy"),
        "null": (edit_plan(lambda p: p.update(cluster=None)), "/cluster"),
    },
)
rows(
    "L5",
    INPUT,
    {
        "duplicate keys": (write_plan(b'{"strategy": "mixed", "strategy": "memory"}'), "strategy"),
        "NaN": (write_plan(b'{"mixed_weight": NaN}'), "NaN"),
        "infinity by overflow": (write_plan(b'{"mixed_weight": 1e400}'), "1e400"),
        "2^63 and beyond": (write_plan(b'{"schema_version": 99999999999999999999999}'), "too large"),
        "5000 digits": (write_plan(b'{"schema_version": ' + b"9" * 5000 + b"}"), "too large"),
        "depth": (write_plan(b'{"a":' * 100_000), "levels"),
        "NUL": (write_plan(b'{"strategy": "a\\u0000b"}'), "NUL"),
        "lone surrogate": (write_plan(b'{"strategy": "\\ud800"}'), "surrogate"),
    },
)


@row("L5", "100 MB", INPUT, "104857600")
def _(tmp: Path) -> list[object]:
    with (tmp / "plan.json").open("wb") as file:
        file.truncate(100 << 20)
    return ["llamaplan", "show", tmp / "plan.json"]


rows(
    "L6",
    INPUT,
    {
        f"start_layer {value!r}": (edit_stage(1, start_layer=value), "/stages/1/start_layer")
        for value in (-1, 2.0, True, "2")
    },
)


@row("L2", "plan of another model", INTEGRITY, "another model")
def _(tmp: Path) -> list[object]:
    without(tmp, "nothing")
    model = model_in(tmp)
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    narrow = {
        n: (t[:256].clone() if n.endswith(("gate_proj.weight", "up_proj.weight")) else t) for n, t in tensors.items()
    }
    narrow = {n: (t[:, :256].clone() if n.endswith("down_proj.weight") else t) for n, t in narrow.items()}
    save_file(narrow, model / "model.safetensors", metadata={"format": "pt"})
    edit_config(intermediate_size=256)(tmp)
    return ["llamaplan", "export", tmp / "plan.json", "--model", model, "-o", tmp / "out"]


@row("L8", "memory claims altered to fit", INTEGRITY, "weight_bytes")
def _(tmp: Path) -> list[object]:
    return edit_plan(lambda plan: plan["stages"][0].update(weight_bytes=1))(tmp)


rows("L9", INFEASIBLE, {"far too little memory": (solve("--device", "cpu=1MiB"), "cpu")})

# --- E: export -----------------------------------------------------------------------------------------------------


def export_to(prepare_target: Callable[[Path], Path], *options: str) -> Prepare:
    def prepare(tmp: Path) -> list[object]:
        target = prepare_target(tmp)
        return ["llamaplan", "export", tmp / "plan.json", "--model", model_in(tmp), "-o", target, *options]

    return prepare


def with_files(tmp: Path) -> Path:
    target = tmp / "out"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    return target


def as_file(tmp: Path) -> Path:
    (tmp / "out").write_text("mine")
    return tmp / "out"


def as_symlink(tmp: Path) -> Path:
    (tmp / "elsewhere").mkdir()
    (tmp / "out").symlink_to(tmp / "elsewhere")
    return tmp / "out"


rows(
    "E5",
    MACHINE,
    {
        "target is an export already": (export_to(lambda tmp: tmp / "shards"), "--force"),
        "target holds other files": (export_to(with_files), "out"),
        "target is a file": (export_to(as_file), "out"),
        "target is a symlink": (export_to(as_symlink), "out"),
    },
)
rows("E6", MACHINE, {"target's parent is missing": (export_to(lambda tmp: tmp / "no" / "where"), "no")})

# --- B: bundles ----------------------------------------------------------------------------------------------------

WEIGHTS = "model-0000{}-of-00003.safetensors"

rows(
    "B1",
    INTEGRITY,
    {
        "a bit of the weights": (
            break_bundle(lambda d: flip_bit(d / WEIGHTS.format(2), offset=(d / WEIGHTS.format(2)).stat().st_size // 2)),
            "00002",
        ),
        "a bit of the tokenizer": (break_bundle(lambda d: flip_bit(d / "tokenizer.json", offset=500)), "tokenizer"),
    },
)
rows(
    "B2",
    INTEGRITY,
    {
        "truncated": (
            break_bundle(lambda d: os.truncate(d / WEIGHTS.format(1), (d / WEIGHTS.format(1)).stat().st_size - 1)),
            "00001",
        ),
        "appended": (
            break_bundle(lambda d: (d / WEIGHTS.format(1)).open("ab").write(b"\0") and None),
            "00001",
        ),
    },
)
rows(
    "B3",
    INTEGRITY,
    {
        "a shard is missing": (break_bundle(lambda d: (d / WEIGHTS.format(3)).unlink()), "00003"),
        "a stage file is missing": (break_bundle(lambda d: (d / "stage-00002-of-00003.json").unlink()), "stage-00002"),
    },
)
rows(
    "B4",
    INTEGRITY,
    {"two shards swapped": (break_bundle(lambda d: swap(d / WEIGHTS.format(1), d / WEIGHTS.format(2))), "0000")},
)
rows(
    "B5",
    INTEGRITY,
    {
        "stage file of another export": (
            break_bundle(
                lambda d: (
                    (d / "stage-00001-of-00003.json").write_text(
                        (d / "stage-00001-of-00003.json").read_text().replace('"export_id": "', '"export_id": "0')[:-1]
                    )
                    and None
                )
            ),
            "stage-00001",
        )
    },
)

# --- R: runtime ----------------------------------------------------------------------------------------------------

rows(
    "R1",
    MACHINE,
    {"device not on this machine": (generate("-p", "x", "-n", "1", "--device-map", "1=cuda:99"), "cuda:99")},
)
rows(
    "R3",
    USAGE,
    {
        "prompt longer than the context": (generate("-p", "x = 1\n" * 300, "-c", "64"), "64"),
        "prompt and new tokens exceed it": (generate("-p", "x", "-n", "100", "-c", "64"), "64"),
    },
)
rows(
    "R2",
    MACHINE,
    {
        "a full cache needs more than is free": (
            lambda tmp: edit_config(max_position_embeddings=10**9)(tmp) and generate_model("-p", "x")(tmp),
            "are free",
        )
    },
)


@row("R5", "empty prompt, and no begin-of-sequence token", USAGE, "empty")
def _(tmp: Path) -> list[object]:
    change_json(model_in(tmp) / "tokenizer.json", lambda tokenizer: tokenizer.update(post_processor=None))
    return generate_model("-p", "", "-n", "1")(tmp)


def prompt_file(data: bytes, *, size: int = 0) -> Prepare:
    def prepare(tmp: Path) -> list[object]:
        with (tmp / "prompt.txt").open("wb") as file:
            file.write(data)
            file.truncate(max(size, len(data)))
        return generate_model("--file", tmp / "prompt.txt", "-n", "1")(tmp)

    return prepare


rows(
    "R6",
    INPUT,
    {
        "prompt file not UTF-8": (prompt_file(b"abc\xff"), "byte 3"),
        "prompt file UTF-16": (prompt_file("abc".encode("utf-16")), "byte 0"),
        "prompt file with NUL": (prompt_file(b"ab\0c"), "byte 2"),
        "prompt file of 1 GB": (prompt_file(b"", size=1 << 30), "1073741824"),
    },
)
rows("R6", USAGE, {"a lone surrogate on the command line": (generate("-p", "caf\udce9", "-n", "1"), "character 3")})
for ids in ("-1", "1.5", "2048", "99999999999999999999", "", "1,,2", "true"):
    rows("R7", USAGE, {f"token ids {ids!r}": (generate("--prompt-ids", ids, "-n", "1"), "prompt")})


def spoil_weight(value: float, *options: str) -> Prepare:
    """Put a value into layer 3, which belongs to stage 1, and run the plan without an export."""

    def prepare(tmp: Path) -> list[object]:
        from safetensors.torch import load_file, save_file

        shard = next(p for p in sorted(model_in(tmp).glob("*.safetensors")) if LAYER_3 in load_file(p))
        tensors = load_file(shard)
        tensors[LAYER_3].fill_(value)
        save_file(tensors, shard, metadata={"format": "pt"})
        command = ["llamarun", "generate", tmp / "plan.json", "--model", model_in(tmp), "--device-map", "cpu"]
        return [*command, "-p", "x", "-n", "4", *options]

    return prepare


LAYER_3 = "model.layers.3.mlp.down_proj.weight"

rows("R10", NUMERICAL, {"NaN in the weights": (spoil_weight(float("nan")), "stage 1")})
rows("R11", USAGE, {"an empty stop string": (generate("-p", "x", "--stop", ""), "stop")})
rows("R17", NUMERICAL, {"weights that fp16 cannot hold": (spoil_weight(1e6, "--dtype", "fp16"), "stage 1")})


# --- the test ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint, a plan for three stages, and its export."""
    from exporter import export
    from planner import solve_model

    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(SHIPPED, folder / "model")
    plan = solve_model(folder / "model", devices=["cpu=1GiB"] * 3, layers=[2, 4, 1])
    (folder / "plan.json").write_text(plan.to_json())
    export(plan, model=folder / "model", output=folder / "shards")
    return folder


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.row(case.id), id=f"{case.id}: {case.what}") for case in ROWS]
)
def test_a_fault_ends_in_one_clear_sentence_and_leaves_nothing_behind(
    case: Row, workplace: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, *arguments = case.prepare(workplace)
    before = snapshot(workplace)
    done = run_command(str(command), *arguments)
    errors = [line for line in done.err.splitlines() if line.startswith("error[E-")]
    assert done.code == case.code, done.err
    assert len(errors) == 1, done.err
    assert case.says in errors[0]
    assert "Traceback" not in done.err
    assert snapshot(workplace) == before


def as_a_user_without_privileges(*command: object) -> list[str]:
    """Root reads everything unless its override capabilities are taken away first."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    return [*drop, sys.executable, "-m", *map(str, command)]


@pytest.mark.row("C2")
@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00004.safetensors", "."])
def test_an_unreadable_file_or_folder_is_named_with_its_errno(workplace: Path, name: str) -> None:
    target = workplace / "model" / name
    mode = target.stat().st_mode
    target.chmod(0)
    command = as_a_user_without_privileges("planner.cli", "analyze", workplace / "model")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    target.chmod(mode)
    assert done.returncode == MACHINE, done.stderr
    assert "errno 13" in done.stderr
    assert str(target) in done.stderr


@pytest.mark.row("C9")
def test_python_code_in_a_checkpoint_is_warned_of_and_never_run(workplace: Path, run_command: RunCommand) -> None:
    marker = workplace / "ran"
    model = model_in(workplace)
    (model / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    edit_config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})(workplace)
    for command in (["llamaplan", "analyze", model], ["llamarun", "generate", model, "-p", "x", "-n", "1"]):
        done = run_command(*map(str, command))
        assert done.code == 0, done.err
        assert "never run" in done.err
    assert not marker.exists()


@pytest.mark.row("X5")
@pytest.mark.parametrize("name", ["with space", "new\nline", "-dash", "übung", "quote'\"", "$HOME", "caf\udce9"])
def test_odd_paths_work(workplace: Path, run_command: RunCommand, name: str) -> None:
    odd = workplace / name
    model_in(workplace).rename(odd)
    done = run_command("llamaplan", "analyze", f"{odd}/", "-o", f"{odd}.json")
    assert done.code == 0, done.err
    assert json.loads(Path(f"{odd}.json").read_text())["total_parameters"] > 0


@pytest.mark.row("X5")
def test_a_relative_path_and_a_trailing_slash_work(
    workplace: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    for path in ("model", "./model/", "model/config.json"):
        assert run_command("llamaplan", "analyze", path).code == 0
