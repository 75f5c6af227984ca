"""Inputs nobody would write by hand: documents, bytes and spellings that are changed at random, the same for one seed.

A document is changed where its structure is (keys, types, numbers, nesting), which gets past the parser; bytes are
changed anywhere, which mostly does not.
"""

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

_BEGIN, _END = "\ue000", "\ue001"
_VERBATIM = re.compile(rf'"{_BEGIN}((?:[^"\\]|\\.)*){_END}"')


def verbatim(text: str) -> str:
    """Return a string that a document is written with as it is, without quotes: what no JSON library would write."""
    return f"{_BEGIN}{text}{_END}"


NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 7, 64, 255, 4096, -1, -2, 10**6, 2**31 - 1, 2**31, 2**53 + 1, 2**60, 2**62, 2**62 + 1, 2**63 - 1),
    *(2**63, 2**64 - 1, 2**64, 10**30, -(2**63), -(10**30), True, False),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 5e-324, 1e-300, 1e-9, 1e6, 1e18, 1.7e308),
    *map(verbatim, ("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "-0", "01", "1.", ".5", "+1", "0x10", "1e5")),
    *(verbatim("9" * 5000), verbatim("0." + "3" * 5000), verbatim("1e" + "9" * 5000), verbatim("1e-" + "9" * 50)),
)
STRINGS: tuple[Any, ...] = (
    *("", " ", "x", "null", "None", "true", "1", "-1", "1e3", "20GiB", "0", "nan", "*", "a,b", "\u0663", "\u00b2"),
    *("\0", "\n", "\r\n", "\t", "\x1b[2J", "\x7f", "\u202e", "\ufeff", "e\u0301", "\u00e9", "\U0001f600", "\ud800"),
    *("../x", "/etc/passwd", "a/b", "a\\b", "-rf", "con", "a" * 300, "a" * 70_000, "%s", "{}", "'\"`$(x)"),
    *("0" * 64, "f" * 64, "cpu", "cuda:0", "local", "embedding", "head", "layer", "fp32", "bf16", "float16", "llama"),
    *("optimal", "custom", "mixed", "latency", "BF16", "F32", "I64", "model.norm.weight", "model.layers.0.x"),
    *map(verbatim, ('"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\\x"', '"', "'x'", '"\t"', "nul", "")),
)
CONTAINERS: tuple[Any, ...] = (
    *([], {}, [[]], [None], [0], ["x"], [1, 2], [{}], {"": 0}, {"x": {}}, None, None),
    *([0] * 5000, ["x"] * 1000, [[0, 0]] * 2000, {str(i): i for i in range(2000)}),
    *(verbatim("[" * n + "]" * n) for n in (60, 70, 1000, 100_000)),
    *(verbatim('{"a":' * 70 + "1" + "}" * 70), verbatim("[" * 50_000)),
)
BYTES = (
    *(b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\x1b", b"\r"),
    *(b"\n", b" ", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\\u0000", b"\\ud800", b"1e999", b"NaN", b"-"),
    *(b"9" * 30, b"/**/", b"[" * 70, b'{"a":1,"a":2}'),
)
LETTERS = "0123456789.,:;=@-+*#%/\\_xX eEinfNaKMGTiB[]{}()\"'\n\t\0\u0663\u00b2\u00bd\u00e9\u202e\ud800\U0001f600"


def mutate_document(
    rng: Random, seed: bytes, *, known: Mapping[str, Sequence[Any]] | None = None, repairs: bool = False
) -> bytes:
    """Return a JSON document changed in one to four places, and now and then in its bytes.

    Args:
        rng: the source of all choices.
        seed: a good document.
        known: keys a reader knows, with values worth trying, added at the top.
        repairs: leave the bytes alone, for a caller that completes the document afterwards.
    """
    root = [json.loads(seed)]
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        if known and isinstance(root[0], dict) and rng.random() < 0.3:
            key = rng.choice(list(known))
            root[0][key] = copy.deepcopy(rng.choice(known[key]))
        else:
            _change_somewhere(rng, root)
    data = _written(root[0])
    return mutate_bytes(rng, data) if not repairs and rng.random() < 0.1 else data


def mutate_lines(rng: Random, seed: bytes, *, known: Mapping[str, Sequence[Any]] | None = None) -> bytes:
    """Return a document per line with one or two lines changed, dropped, repeated, or replaced by something else."""
    lines = seed.split(b"\n")
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.randrange(len(lines))
        if lines[place].strip() and rng.random() < 0.8:
            lines[place] = mutate_document(rng, _first_good(lines[place], seed), known=known)
        else:
            lines[place : place + rng.randrange(2)] = [rng.choice((b"", b"{}", b"[]", b"null", b" ", lines[place]))]
    return mutate_bytes(rng, b"\n".join(lines)) if rng.random() < 0.05 else b"\n".join(lines)


def mutate_bytes(rng: Random, seed: bytes, *, others: Sequence[bytes] = ()) -> bytes:
    """Return bytes with one to four flips, cuts, insertions, repetitions or splices."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((0, 1, 1, 2, 8, 100)))
        kind = rng.randrange(7)
        if kind == 0 and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[start:]
        elif kind == 2:
            del data[start:end]
        elif kind == 3:
            data[start:end] = rng.choice(BYTES)
        elif kind == 4:
            data[start:start] = data[start:end] * rng.choice((1, 2, 50))
        elif kind == 5 and others:
            other = rng.choice(others)
            data[start:] = other[rng.randrange(len(other) + 1) :]
        else:
            data[start:end] = rng.randbytes(end - start)
    return bytes(data)


def mutate_text(rng: Random, seed: str, *, pieces: Sequence[str] = ()) -> str:
    """Return a spelling with one to three characters, numbers or pieces changed."""
    text = seed
    for _ in range(rng.choice((1, 1, 2, 3))):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice((0, 0, 1, 1, 3)))
        kind = rng.randrange(6)
        if kind == 0:
            text = text[:start] + rng.choice(LETTERS) + text[end:]
        elif kind == 1 and pieces:
            text = text[:start] + rng.choice(pieces) + text[end:]
        elif kind == 2:
            text = text[:start] + text[end + 1 :]
        elif kind == 3:
            text = re.sub(r"\d+", lambda _found: rng.choice(_DIGITS), text, count=1, flags=re.ASCII)
        elif kind == 4:
            text = text[:start] + text[start:end] * rng.choice((2, 3, 40, 3000)) + text[end:]
        else:
            text = rng.choice((text.upper(), text.strip(), " " + text, text + "\n", text[::-1], text + text, text[:1]))
    return text


_DIGITS = ("0", "1", "00", "-1", "2.5", "1e3", "99999", "65535", "65536", "2147483648", "9" * 25, "9" * 5000, "\u0664")


def _change_somewhere(rng: Random, root: list[Any]) -> None:
    container, key = _place(rng, root)
    rng.choice(_CHANGES)(rng, container, key)


def _place(rng: Random, root: list[Any]) -> tuple[Any, Any]:
    """Go down from the root at random; a place is a container and a key or an index that is in it."""
    container: Any = root
    key: Any = 0
    while isinstance(inner := container[key], dict | list) and inner and (container is root or rng.random() < 0.75):
        container, key = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    return container, key


def _replace(rng: Random, container: Any, key: Any) -> None:
    container[key] = copy.deepcopy(rng.choice(rng.choice((NUMBERS, STRINGS, CONTAINERS))))


def _nudge(rng: Random, container: Any, key: Any) -> None:
    """A value that is nearly the one before."""
    value = container[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        power = 10 ** rng.randrange(1, 19)
        near = (value + 1, value - 1, -value, value * 2, value / 2, value * power, value / power, str(value), [value])
        container[key] = rng.choice((*near, bool(value), float(value)))
    elif isinstance(value, str):
        container[key] = mutate_text(rng, value)
    elif isinstance(value, list):
        container[key] = rng.choice((value[:-1], value[1:], value + value[:1], value[::-1], value * 2, value * 300))
    else:
        container[key] = rng.choice(([value], {"x": value}, str(value), None))


def _delete(_rng: Random, container: Any, key: Any) -> None:
    del container[key]
    if isinstance(container, list) and not container:
        container.append(None)  # the root must stay something


def _rename(rng: Random, container: Any, key: Any) -> None:
    if isinstance(container, dict):
        name = rng.choice(
            (key + "s", key[:-1], key.upper(), f"_{key}", "", rng.choice(list(container)), "schema_version")
        )
        container[name] = container.pop(key)


def _repeat_key(rng: Random, container: Any, key: Any) -> None:
    if isinstance(container, dict):
        container[verbatim(json.dumps(key))] = rng.choice((container[key], None, 1))
    else:
        container.insert(key, copy.deepcopy(container[key]))


def _move(rng: Random, container: Any, key: Any) -> None:
    """Two values of one container change places."""
    other = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
    container[key], container[other] = container[other], container[key]


def _add(rng: Random, container: Any, _key: Any) -> None:
    value = copy.deepcopy(rng.choice(rng.choice((NUMBERS, STRINGS, CONTAINERS))))
    if isinstance(container, dict):
        name = rng.choice(STRINGS)
        container[name] = value
    else:
        container.append(value)


_CHANGES: tuple[Callable[[Random, Any, Any], None], ...] = (
    *(_replace,) * 4,
    *(_nudge,) * 4,
    *(_delete, _rename, _repeat_key, _move, _move, _add),
)


def _written(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False)
    return _VERBATIM.sub(lambda found: json.loads(f'"{found[1]}"', strict=False), text).encode("utf-8", "surrogatepass")


def _first_good(line: bytes, seed: bytes) -> bytes:
    """The line itself, or the seed's first one where a change before this one left no document."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return seed.split(b"\n")[0]
    return line
