"""GGUF files: headers changed where their numbers, names and types lie, and anywhere."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import gguf

from planner.model.profile import build_profile
from plans.checkpoint.folder import open_checkpoint
from plans.gguf.header import GgufHeader, read_gguf_header
from tests.gguf_files import config_for, write_gguf
from tests.hostile.fuzz_reader import Reader, reader, reads_back
from tests.hostile.mutations import mutate_bytes

SMALL = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 16, "num_hidden_layers": 2}
SLACK_BYTES = 256
"""Behind the last tensor, so that a header that has grown is not all that is wrong."""
NUMBERS = (
    *(0, 1, 2, 3, 4, 7, 8, 9, 12, 16, 30, 31, 32, 33, 64, 96, 255, 256, 4096, 65_536, 100_000, 100_001, 1 << 20),
    *((1 << 20) + 1, 8 << 20, 128 << 20, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
NAMES = (
    *(
        b"general.architecture",
        b"general.alignment",
        b"llama.block_count",
        b"llama.attention.head_count",
        b"llama",
        b"",
    ),
    *(b"token_embd.weight", b"output.weight", b"rope_freqs.weight", b"blk.0.attn_q.weight", b"blk.1.attn_q.bias"),
    *(b"blk.99999.attn_q.weight", b"../x", b"\0", b"\xff\xfe", b"\x1b[2J", b"\xed\xa0\x80", b"a" * 300, b"qwen3"),
    *(b"llama.rope.scaling.type", b"yarn", b"split.count", b"split.no", b"llama.vocab_size", b"llama.expert_count"),
)


@dataclass(frozen=True, slots=True)
class _Field:
    """A number of a header, or a string with the number of its bytes before it."""

    begin: int
    end: int
    is_text: bool


@dataclass(frozen=True, slots=True)
class _Seed:
    header: bytes
    fields: tuple[_Field, ...]
    data_bytes: int
    """Of the tensors: zeros."""


@reader
def gguf_header(folder: Path) -> Reader:
    """Headers of GGUF files; the data behind them are zeros, as many as the good file has."""
    seeds, path = list(_seeds(folder)), folder / "model.gguf"

    def make(rng: Random) -> bytes:
        seed = rng.choice(seeds)
        changed = _changed(rng, seed) if rng.random() < 0.8 else mutate_bytes(rng, seed.header)
        return seed.data_bytes.to_bytes(8, "little") + changed

    def read(data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[8:])
            file.truncate(len(data) - 8 + int.from_bytes(data[:8], "little"))
        try:
            _compare(read_gguf_header(path), path)
        finally:
            reads_back(build_profile(open_checkpoint(path)))

    return Reader(make=make, read=read)


def _compare(found: GgufHeader, path: Path) -> None:
    """What was accepted must be what the package `gguf` reads, as far as it reads such a file."""
    try:
        theirs = gguf.GGUFReader(path).tensors
    except (ValueError, KeyError, IndexError, UnicodeDecodeError, OverflowError):
        return  # stricter in places, for example about names of metadata
    rows = [(t.name, t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), t.data_offset) for t in theirs]
    ours = [(name, tensor.type.name, tensor.shape, tensor.begin) for name, tensor in found.tensors.items()]
    assert ours == rows, "is read as something else than the package reads"


def _seeds(folder: Path) -> Iterator[_Seed]:
    for number, family in enumerate(("llama", "mixtral", "qwen3", "phi3")):
        path = write_gguf(folder / f"seed{number}.gguf", config_for(family, **SMALL))
        data, end = path.read_bytes(), min(t.begin for t in read_gguf_header(path).tensors.values())
        yield _Seed(data[:end], tuple(_fields(data)), len(data) - end + SLACK_BYTES)
        path.unlink()


def _changed(rng: Random, seed: _Seed) -> bytes:
    """Change one to three fields; a string mostly keeps the number of its bytes right."""
    data = bytearray(seed.header)
    for field in sorted(rng.sample(seed.fields, rng.choice((1, 1, 1, 2, 3))), key=lambda field: -field.begin):
        if field.is_text and rng.random() < 0.9:
            name = rng.choice((*NAMES, mutate_bytes(rng, seed.header[field.begin + 8 : field.end])))
            data[field.begin : field.end] = len(name).to_bytes(8, "little") + name
        else:
            size = 8 if field.is_text else field.end - field.begin
            number = rng.choice((rng.choice(NUMBERS), rng.randrange(1 << 8 * size))) % (1 << 8 * size)
            data[field.begin : field.begin + size] = number.to_bytes(size, "little")
    return bytes(data)


def _fields(data: bytes) -> Iterator[_Field]:
    """Yield every number and string of a good header, walking it as docs/gguf.md of ggml says."""
    position = 4

    def number(size: int) -> Iterator[_Field]:
        nonlocal position
        yield _Field(position, position + size, is_text=False)
        position += size

    def text() -> Iterator[_Field]:
        nonlocal position
        size = 8 + int.from_bytes(data[position : position + 8], "little")
        yield _Field(position, position + size, is_text=True)
        position += size

    def value(kind: int) -> Iterator[_Field]:
        return text() if kind == _STRING else number(struct.calcsize(f"<{_SPELLINGS[kind]}"))

    yield from (*number(4), *number(8), *number(8))
    num_tensors, num_entries = struct.unpack_from("<QQ", data, 8)
    for _ in range(num_entries):
        yield from (*text(), *number(4))
        kind, count = int.from_bytes(data[position - 4 : position], "little"), 1
        if kind == _ARRAY:
            kind, count = struct.unpack_from("<IQ", data, position)
            yield from (*number(4), *number(8))
        for _ in range(count):
            yield from value(kind)
    for _ in range(num_tensors):
        yield from (*text(), *number(4))
        for size in (*_dimensions(data, position), 4, 8):
            yield from number(size)


def _dimensions(data: bytes, position: int) -> Sequence[int]:
    return [8] * int.from_bytes(data[position - 4 : position], "little")


_SPELLINGS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
