"""The strict reader of GGUF headers, against the package `gguf` and against files made to go wrong."""

import random
import resource
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from plans.errors import InputError, IntegrityError, LlamaplanError
from plans.gguf.header import MAX_ARRAY, GgufHeader, read_gguf_header
from plans.gguf.types import TENSOR_TYPES
from tests.gguf_files import mutated

VALUES = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.5,
    "tokenizer.ggml.tokens": ["<s>", "a", "Ġ über"],
    "tokenizer.ggml.scores": [0.0, -1.5, 2.25],
    "tokenizer.ggml.add_bos_token": True,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a tensor of every type, made by the package `gguf`."""
    path = tmp_path_factory.mktemp("gguf") / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in VALUES.items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool,
         list: writer.add_array}[type(value)](key, value) if key != "general.architecture" else None  # fmt: skip
    for number, known in TENSOR_TYPES.items():
        row = 256 // known.block_weights * known.block_bytes
        raw = np.zeros((3, row), dtype=np.uint8)
        writer.add_tensor(f"blk.{number}.{known.name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType(number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_types_and_block_sizes_are_all_of_the_packages() -> None:
    ours = {number: (known.name, (known.block_weights, known.block_bytes)) for number, known in TENSOR_TYPES.items()}
    assert ours == {int(kind): (kind.name, size) for kind, size in gguf.GGML_QUANT_SIZES.items()}


def test_a_header_reads_as_the_package_reads_it(written: Path) -> None:
    found, reader = read_gguf_header(written), gguf.GGUFReader(written)
    assert {key: found.metadata[key] for key in VALUES} == VALUES
    assert list(found.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = found.tensors[tensor.name]
        assert (ours.type.name, ours.shape) == (tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape)))
        assert (ours.begin, ours.size_bytes) == (tensor.data_offset, tensor.n_bytes)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, *, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def opening(num_tensors: int = 0, num_entries: int = 0, *, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries)


WRONG: dict[str, tuple[bytes, type[LlamaplanError], str]] = {
    "another file": (b"PK\x03\x04" + bytes(64), InputError, "not a GGUF file"),
    "nothing": (b"", InputError, "not a GGUF file"),
    "an old version": (opening(version=1), InputError, "is GGUF version 1"),
    "a big-endian file": (b"GGUF" + struct.pack(">I", 3) + bytes(16), InputError, "other byte order"),
    "too many tensors": (opening(1 << 60), InputError, "tensors; expected at most"),
    "too many entries": (opening(0, 1 << 40), InputError, "metadata entries; expected at most"),
    "a string longer than the cap": (opening(0, 1) + struct.pack("<Q", 1 << 62), InputError, "is a string of"),
    "a name that is not UTF-8": (opening(0, 1) + text(b"\xff\xfe"), InputError, "not UTF-8 at byte 0"),
    "a key twice": (opening(0, 2) + entry("a", 0, b"\1") * 2, InputError, "'a' appears twice"),
    "an unknown value type": (opening(0, 1) + entry("a", 77, b""), InputError, "'a' is of type 77"),
    "an array of arrays": (opening(0, 1) + entry("a", 9, struct.pack("<IQ", 9, 1)), InputError, "'a' is of type 9"),
    "an array beyond the cap": (
        opening(0, 1) + entry("a", 9, struct.pack("<IQ", 8, MAX_ARRAY + 1)), InputError, "elements of a"),
    "an alignment that is none": (
        opening(0, 1) + entry("general.alignment", 4, struct.pack("<I", 3)), InputError, "general.alignment is 3"),
    "no dimension": (opening(1) + tensor("t", shape=()), InputError, "has 0 dimensions"),
    "a huge dimension": (opening(1) + tensor("t", shape=(1 << 50,)), InputError, "has shape"),
    "half a block": (opening(1) + tensor("t", shape=(33,), kind=2), InputError, "whole blocks of 32"),
    "an unknown tensor type": (opening(1) + tensor("t", kind=99), InputError, "type 99, which is not known"),
    "a removed tensor type": (opening(1) + tensor("t", kind=4), InputError, "type 4, which is not known"),
    "a hole": (opening(1) + tensor("t", offset=64) + bytes(512), InputError, "lies at 64; expected 0"),
    "an overlap": (
        opening(2) + tensor("t") + tensor("u", offset=32) + bytes(512), InputError, "lies at 32; expected 128"),
    "no data": (opening(1) + tensor("t"), IntegrityError, "the tensors end at byte"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str, tmp_path: Path) -> None:
    data, error, words = WRONG[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(error, match=words) as caught:
        read_gguf_header(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_is_truncated(share: float, written: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    data = written.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(IntegrityError, match="truncated"):
        read_gguf_header(path)


def outcome(path: Path) -> GgufHeader | LlamaplanError:
    try:
        return read_gguf_header(path)
    except LlamaplanError as error:
        return error


def test_a_mutated_header_is_refused_or_reads_as_the_package_reads_it(written: Path, tmp_path: Path) -> None:
    data, path, rng = written.read_bytes(), tmp_path / "mutated.gguf", random.Random(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = 0
    for _ in range(1500):
        path.write_bytes(mutated(data, rng))
        began = time.process_time()
        found = outcome(path)
        assert time.process_time() - began < 2
        accepted += isinstance(found, GgufHeader)
    assert accepted
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 << 10  # KiB
