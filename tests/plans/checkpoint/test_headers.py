"""Safetensors headers from hostile hands, and checkpoint folders whose files contradict each other."""

import json
import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.header import MAX_HEADER_BYTES, read_header
from plans.errors import InputError, IntegrityError, LlamaplanError
from plans.reading.files import check_basename, write_text
from tests.planner.cases import TINY, write_safetensors
from tests.planner.model.test_profile import tensors_of, write_checkpoint


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw_file(header: bytes, body: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def file_of(header: dict[str, Any], body: int = 8) -> bytes:
    return raw_file(json.dumps(header).encode(), bytes(body))


HOSTILE: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 3, "not a safetensors file"),
    "seven bytes": (b"1234567", 3, "file of 7 bytes"),
    "length 0": (raw_file(b"", length=0), 3, "length reads 0"),
    "length 1": (raw_file(b"{", length=1), 3, "length reads 1"),
    "length beyond the cap": (raw_file(b"{}", length=MAX_HEADER_BYTES + 1), 3, "length reads"),
    "length 2^63": (raw_file(b"{}", length=2**63), 3, "9223372036854775808"),
    "length beyond the file": (raw_file(b"{}", length=1000), 5, "needs 1008 bytes and the file has 10"),
    "no object": (raw_file(b"[]"), 3, "no JSON object"),
    "broken JSON": (raw_file(b'{"a"'), 3, "not JSON"),
    "duplicate tensor": (raw_file(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":1}', bytes(4)), 3, "dupl"),
    "NaN in the header": (raw_file(b'{"a": NaN}'), 3, "NaN"),
    "metadata is no table": (file_of({"__metadata__": 3}), 3, "__metadata__"),
    "metadata holds numbers": (file_of({"__metadata__": {"a": 1}}), 3, "__metadata__"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", 3, "Git LFS pointer"),
    "HTML page": (b"<!DOCTYPE html><html>404</html>", 3, "HTML"),
    "HTML after blanks": (b"\n\n <html>", 3, "HTML"),
    "name climbs": (file_of({"../../x": entry()}), 3, "unsafe tensor name"),
    "name with NUL": (raw_file(b'{"a\\u0000": 1}'), 3, "NUL"),
    "name with newline": (file_of({"a\nb": entry()}), 3, "unsafe tensor name"),
    "name with an escape sequence": (file_of({"\x1b[31mred": entry()}), 3, "\\x1b[31mred"),
    "name of 64 KB": (file_of({"a" * 65536: entry()}), 3, "unsafe tensor name"),
    "empty name": (file_of({"": entry()}), 3, "unsafe tensor name"),
    "unknown dtype": (file_of({"a": entry(dtype="F4")}), 3, "dtype F4 is not supported"),
    "sub-byte dtype": (file_of({"a": entry(dtype="F6_E2M3")}), 3, "one of BF16"),
    "dtype is a list": (file_of({"a": entry(dtype=["F32"])}), 3, "not supported"),
    "dtype is null": (file_of({"a": entry(dtype=None)}), 3, "not supported"),
    "negative shape": (file_of({"a": entry(shape=(-2,))}), 3, "non-negative"),
    "shape is a float": (file_of({"a": entry(shape=(2.0,))}), 3, "non-negative"),
    "shape is a bool": (file_of({"a": entry(shape=(True, 2))}), 3, "non-negative"),
    "shape is null": (file_of({"a": entry(shape=None)}), 3, "non-negative"),
    "shape of 9 dimensions": (file_of({"a": entry(shape=(1,) * 8 + (2,))}), 3, "non-negative"),
    "shape overflows": (file_of({"a": entry(shape=(2**32, 2**32, 2**32))}), 3, "the offsets hold 8"),
    "shape beyond 62 bits": (file_of({"a": entry(shape=(2**62,))}), 3, "non-negative"),
    "shape and offsets differ": (file_of({"a": entry(shape=(3,))}), 3, "is 12 bytes, the offsets hold 8"),
    "offsets reversed": (file_of({"a": entry(offsets=(8, 0))}), 3, "the offsets hold -8"),
    "three offsets": (file_of({"a": entry(offsets=(0, 4, 8))}), 3, "non-negative"),
    "an extra key": (file_of({"a": entry() | {"endian": "big"}}), 3, "malformed entry"),
    "a missing key": (file_of({"a": {"dtype": "F32", "shape": [2]}}), 3, "malformed entry"),
    "overlap": (file_of({"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))}), 5, "overlaps"),
    "the same bytes twice": (file_of({"a": entry(), "b": entry()}), 5, "overlaps"),
    "a hole": (file_of({"a": entry(), "b": entry(shape=(1,), offsets=(12, 16))}, body=16), 5, "leaves a hole"),
    "a hole at the start": (file_of({"a": entry(offsets=(4, 12))}, body=12), 5, "leaves a hole"),
    "one byte too few": (file_of({"a": entry()}, body=7), 5, "describes"),
    "one byte too many": (file_of({"a": entry()}, body=9), 5, "describes"),
}


@pytest.mark.parametrize(("data", "code", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused(data: bytes, code: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(LlamaplanError) as caught:
        read_header(path)
    assert caught.value.exit_code == code
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_hundreds_of_thousands_of_empty_tensors_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    row = b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    header = b"{" + b"".join(row % i for i in range(250_000)) + b'"__metadata__":{}}'
    (tmp_path / "many").write_bytes(raw_file(header))
    start = time.process_time()
    with pytest.raises(InputError, match="250000 tensors in one file"):
        read_header(tmp_path / "many")
    assert time.process_time() - start < 1  # parsing them takes five times as long


def test_a_header_of_60_mb_is_refused_by_its_length(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.write(raw_file(b"{}", length=60 << 20))
        file.truncate((60 << 20) + 8)
    with pytest.raises(InputError, match="header length reads 62914560"):
        read_header(tmp_path / "large")


@pytest.mark.parametrize("length", range(80, 80 + 256))
def test_a_header_of_any_length_is_read(length: int, tmp_path: Path) -> None:
    # the first byte of the file is the length modulo 256: it may look like "<", a blank or a "v"
    header = json.dumps({"a": entry()}).encode().ljust(length)
    (tmp_path / "x").write_bytes(raw_file(header, bytes(8)))
    assert list(read_header(tmp_path / "x").tensors) == ["a"]


def test_a_good_header_gives_tensors_in_file_order_with_absolute_offsets(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"b": ("BF16", (2, 3)), "a": ("F32", ()), "z": ("U8", (0,))})
    header = read_header(tmp_path / "x")
    assert list(header.tensors)[:2] == ["b", "a"]
    assert header.tensors["b"].size_bytes == 12
    assert header.tensors["b"].num_elements == 6
    assert header.tensors["a"].end == header.file_bytes


@given(data=st.binary(min_size=1, max_size=3), position=st.integers(0, 300))
@settings(max_examples=200)
def test_flipped_bytes_are_read_or_refused_but_never_crash(
    data: bytes, position: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    write_safetensors(path, {"model.norm.weight": ("F32", (4,)), "lm_head.weight": ("BF16", (2, 4))})
    good = path.read_bytes()
    position %= len(good)
    path.write_bytes(good[:position] + data + good[position + len(data) :])
    with suppress(InputError, IntegrityError):
        header = read_header(path)
        assert sum(entry.size_bytes for entry in header.tensors.values()) == 32


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """TINY in two shards with an index."""
    tensors = tensors_of()
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    for file, part in parts.items():
        write_safetensors(tmp_path / file, {name: tensors[name] for name in part})
    weight_map = {name: file for file, part in parts.items() for name in part}
    total = sum((tmp_path / file).stat().st_size - header_size(tmp_path / file) for file in parts)
    write_index(tmp_path, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return tmp_path


def header_size(path: Path) -> int:
    return 8 + int(struct.unpack("<Q", path.read_bytes()[:8])[0])


def write_index(folder: Path, document: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def read_index(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    return result


def test_a_sharded_folder_opens_without_warnings(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert [shard.name for shard in checkpoint.shards] == sorted({p.name for p in sharded.glob("*.safetensors")})
    assert checkpoint.warnings == ()


BAD_NAMES = ["../x", "/etc/passwd", "a/b", "..\\x", "x\0y", "", "x" * 300, "x.", "x ", "cafe\u0301", "-x", ".", "C:x"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_shard_name_that_is_no_plain_file_name_is_refused_before_any_open(name: str, sharded: Path) -> None:
    index = read_index(sharded)
    index["weight_map"][next(iter(index["weight_map"]))] = name
    write_index(sharded, index)
    with pytest.raises(InputError):
        open_checkpoint(sharded)


@given(st.text(max_size=40))
def test_a_safe_name_has_no_separator_and_no_control_character(name: str) -> None:
    try:
        check_basename(name, where="x")
    except InputError:
        return
    assert name == Path(name).name
    assert name.isprintable()
    assert name not in ("", ".", "..")


Change = Callable[[Path], None]


def replaced(make: Callable[[Path], None]) -> Change:
    def change(folder: Path) -> None:
        shard = folder / "model-00002-of-00002.safetensors"
        shard.rename(folder / "aside.bin")
        make(shard)

    return change


def edit_map(edit: Callable[[dict[str, Any]], None]) -> Change:
    def change(folder: Path) -> None:
        index = read_index(folder)
        edit(index["weight_map"])
        write_index(folder, index)

    return change


def duplicate_key(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x",'))


def twice(folder: Path) -> None:
    tensors = tensors_of()
    names = [name for name, file in read_index(folder)["weight_map"].items() if "00002" in file]
    extra = {name: tensors[name] for name in [*names, "model.embed_tokens.weight"]}
    write_safetensors(folder / "model-00002-of-00002.safetensors", extra)


FOLDERS: dict[str, tuple[Change, str]] = {
    "a FIFO": (replaced(lambda path: os.mkfifo(path)), "not a regular file"),
    "a folder": (replaced(lambda path: path.mkdir()), "not a regular file"),
    "a device": (replaced(lambda path: path.symlink_to("/dev/zero")), "link out of the folder"),
    "a link out of the folder": (replaced(lambda path: path.symlink_to("/etc/hostname")), "link out of the folder"),
    "a dangling link": (replaced(lambda path: path.symlink_to("nowhere")), "download is incomplete"),
    "a link to itself": (replaced(lambda path: path.symlink_to(path.name)), "incomplete"),
    "missing": (replaced(lambda _path: None), "lists model-00002-of-00002.safetensors, which is missing"),
    "a tensor the index lacks": (edit_map(lambda m: m.pop("lm_head.weight")), "lm_head.weight, which the index does"),
    "a tensor the shard lacks": (edit_map(lambda m: m.update({"x": m["lm_head.weight"]})), "says x is in"),
    "a tensor in the wrong shard": (
        edit_map(lambda m: m.update({"lm_head.weight": "model-00002-of-00002.safetensors"})),
        "lm_head.weight",
    ),
    "a duplicate key": (duplicate_key, "duplicate key"),
    "a tensor in two shards": (twice, "which the index maps to another file"),
    "an empty map": (edit_map(lambda m: m.clear()), "lists 0 tensors"),
    "a number for a file": (edit_map(lambda m: m.update({"x": 3})), "table of file names"),
    "no map": (lambda folder: write_index(folder, {}), "table of file names"),
    "a list": (lambda folder: write_index(folder, []), "table of file names"),
}


@pytest.mark.parametrize(("change", "message"), FOLDERS.values(), ids=FOLDERS)
def test_an_index_and_shards_that_disagree_are_refused(change: Change, message: str, sharded: Path) -> None:
    change(sharded)
    with pytest.raises(InputError) as caught:
        open_checkpoint(sharded)
    assert message in str(caught.value)


@pytest.mark.row("C16")
@pytest.mark.parametrize("stated", [1, -1, "many", None, 1.5])
def test_a_wrong_total_size_is_a_warning_because_the_headers_count(stated: Any, sharded: Path) -> None:
    index = read_index(sharded)
    index["metadata"]["total_size"] = stated
    write_index(sharded, index)
    (warning,) = open_checkpoint(sharded).warnings
    assert "total_size" in warning


@pytest.mark.row("C16")
def test_a_missing_total_size_is_fine(sharded: Path) -> None:
    index = read_index(sharded)
    del index["metadata"]
    write_index(sharded, index)
    assert open_checkpoint(sharded).warnings == ()


@pytest.mark.row("C12")
def test_with_an_index_and_a_single_file_the_index_is_used_and_said(sharded: Path) -> None:
    write_safetensors(sharded / "model.safetensors", tensors_of())
    checkpoint = open_checkpoint(sharded)
    assert len(checkpoint.shards) == 2
    assert "the index is used" in checkpoint.warnings[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model.bf16.safetensors"], r"model\.bf16\.safetensors, which is neither.*rename it"),
        (["pytorch_model.bin"], "pytorch_model.bin, which is not safetensors.*save_pretrained"),
        (["model.gguf"], "model.gguf"),
        (["consolidated.00.pth"], "consolidated.00.pth"),
        (["model.safetensors.incomplete"], "download is incomplete"),
    ],
)
def test_a_folder_without_safetensors_says_what_it_holds_and_what_to_do(
    files: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    for name in files:
        (tmp_path / name).write_bytes(b"never opened")
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path)


def test_a_truncated_single_file_is_an_integrity_error(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tensors_of())
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)
    with pytest.raises(IntegrityError, match="truncated"):
        open_checkpoint(folder)


def test_layers_are_counted_without_leading_zeros(tmp_path: Path) -> None:
    tensors = tensors_of() | {"model.layers.01.mlp.up_proj.weight": ("BF16", (48, 32))}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors))
    from plans.checkpoint.units import unexpected_tensors

    assert unexpected_tensors(checkpoint) == ("model.layers.01.mlp.up_proj.weight",)


# --- writing ------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_with_the_modes_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a.json", "one")
        write_text(tmp_path / "a.json", "two\n")
    finally:
        os.umask(old)
    assert (tmp_path / "a.json").read_text() == "two\n"
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["folder", "no/where", "x" * 300, "a\0b"])
def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(LlamaplanError) as caught:
        write_text(tmp_path / name, "text")
    assert caught.value.exit_code == 6
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
