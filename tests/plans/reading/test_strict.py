"""The strict reader: what is refused, where it points, and that what we write reads back byte for byte."""

import json
import string
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from plans.errors import InputError, UsageError, printable
from plans.reading.sizes import MAX_BYTES, ByteSize, format_bytes, parse_bytes
from plans.reading.strict import StrictModel, dump_json, parse_json, read_json


class Inner(StrictModel):
    """A small document."""

    size: ByteSize
    share: float = 0.5


class Document(StrictModel):
    """A document with the kinds of fields ours have."""

    schema_version: Literal[1] = 1
    count: Annotated[int, Field(ge=0)]
    rows: tuple[Inner, ...] = ()
    name: str | None = None


class Pair(StrictModel):
    """A document whose fields must agree: what is wrong then lies at no field."""

    low: int
    high: int

    @model_validator(mode="after")
    def _in_order(self) -> "Pair":
        if self.low > self.high:
            raise ValueError(f"low {self.low} exceeds high {self.high}")
        return self


def test_what_is_wrong_with_a_whole_document_is_said_of_the_file_alone() -> None:
    with pytest.raises(InputError) as caught:
        Pair.from_json(b'{"low": 2, "high": 1}', where="pair.json")
    assert caught.value.line().startswith("pair.json: value error, low 2 exceeds high 1")


REFUSED = {
    "nothing": (b"", "empty"),
    "blanks": (b" \n\t", "empty"),
    "half a document": (b'{"a": [1,\n 2', ":2:"),
    "two documents": (b"{} {}", "Extra data"),
    "a trailing comma": (b"[1,]", "not JSON"),
    "a comment": (b"{} // hi", "not JSON"),
    "single quotes": (b"{'a': 1}", "not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "byte-order mark"),
    "a byte-order mark": (b"\xef\xbb\xbf{}", "byte-order mark"),
    "duplicate keys": (b'{"a": 1, "a": 1}', "duplicate key 'a'"),
    "duplicate keys deep inside": (b'[{"b": {"x": 1, "x": 2}}]', "duplicate key 'x'"),
    "NaN": (b"[NaN]", "NaN is not a finite number"),
    "infinity": (b"[-Infinity]", "Infinity"),
    "infinity by overflow": (b"[1e999]", "1e999"),
    "an integer beyond 64 bits": (b"[18446744073709551616]", "too large"),
    "an integer of 5000 digits": (b"[" + b"7" * 5000 + b"]", "too large"),
    "a NUL": (b'["a\\u0000b"]', "NUL"),
    "a NUL in a key": (b'{"a\\u0000b": 1}', "NUL"),
    "a lone surrogate": (b'["\\ud800"]', "surrogate"),
    "65 levels": (b"[" * 65 + b"]" * 65, "deeper than 64"),
    "100,000 levels": (b"[" * 100_000, "deeper than 64"),
    "100,000 levels of objects": (b'{"a":' * 100_000, "deeper than 64"),
}


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_strict_json_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_json(data, where="file.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("file.json")


def test_brackets_inside_strings_are_not_levels() -> None:
    text = json.dumps(["[" * 1000, '"[[' * 50, "\\[" * 100])
    assert parse_json(text.encode(), where="x") == json.loads(text)


def test_text_made_to_be_searched_again_and_again_is_read_once() -> None:
    start = time.process_time()
    for data in (b'["' + b'\\"' * 500_000, b'"' * 500_001, b'["' + b"\\" * 500_001):
        with pytest.raises(InputError):
            parse_json(data, where="x")
    assert time.process_time() - start < 2  # starting over at every quote would take minutes


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"count": True}, "/count"),
        ({"count": 1.0}, "/count"),
        ({"count": "1"}, "/count"),
        ({"count": None}, "/count"),
        ({"count": -1}, "/count"),
        ({"extra": 1}, "/extra"),
        ({"schema_version": 2}, "/schema_version"),
        ({"schema_version": "1"}, "/schema_version"),
        ({"schema_version": 1.5}, "/schema_version"),
        ({"rows": {}}, "/rows"),
        ({"rows": [{"size": 1}, {"size": "much"}]}, "/rows/1/size"),
        ({"rows": [{"size": 1, "share": "half"}]}, "/rows/0/share"),
        ({"name": 3}, "/name"),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_at_its_json_pointer(change: dict[str, Any], pointer: str) -> None:
    data = json.dumps({"count": 1} | change).encode()
    with pytest.raises(InputError, match=r"^file\.json:") as caught:
        Document.from_json(data, where="file.json")
    assert f"file.json:{pointer}: " in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InputError, match="x:/count: field required"):
        Document.from_json(b"{}", where="x")


def test_several_problems_are_counted() -> None:
    with pytest.raises(InputError, match="and 1 more problem"):
        Document.from_json(b'{"count": "a", "name": 3}', where="x")


def test_a_file_above_the_cap_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(InputError, match="104857600 bytes"):
        read_json(path, max_bytes=1 << 20)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(string.ascii_letters), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(JSON)
def test_canonical_json_reads_back_and_writes_the_same_bytes(value: Any) -> None:
    text = dump_json(value)
    again = parse_json(text.encode(), where="x")
    assert again == value
    assert dump_json(again) == text


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_raise_our_error(data: bytes) -> None:
    with suppress(InputError):
        parse_json(data, where="x")


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("7B", 7), ("20GB", 20 * 10**9), ("20GiB", 20 * 2**30), ("1.5 KiB", 1536), ("0.3B", 0), ("1TiB", 2**40)],
)
def test_sizes_are_decimal_with_gb_and_binary_with_gib(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "-1",
        "1e3",
        "1.GiB",
        ".5GiB",
        "20 G iB",
        "20gib",
        "20Gb",
        "20PiB",
        "nan",
        "inf",
        "1_000",
        "\uff10",
        "9" * 21,
    ],
)
def test_other_spellings_of_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_bytes(text)


@pytest.mark.parametrize("value", [80.5, True, None, [], 2**61, -1, "1e3"])
def test_a_size_in_a_file_is_whole_bytes_or_a_spelled_size(value: Any) -> None:
    with pytest.raises(InputError, match="/rows/0/size"):
        Document.from_json(json.dumps({"count": 1, "rows": [{"size": value}]}).encode(), where="x")


def test_a_spelled_size_is_written_back_as_bytes() -> None:
    document = Document.from_json(b'{"count": 1, "rows": [{"size": "2KiB"}]}', where="x")
    assert json.loads(document.to_json())["rows"][0]["size"] == 2048


@given(st.integers(0, MAX_BYTES))
def test_printed_sizes_keep_three_digits(value: int) -> None:
    number, unit = format_bytes(value).split()
    power = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)
    assert float(number) * 1024**power == pytest.approx(value, rel=6e-3, abs=0.5)


@given(st.text(max_size=200))
def test_printable_text_holds_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) <= 120
