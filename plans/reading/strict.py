"""Strict JSON: the one way files of ours, and everything that came from elsewhere, are read and written.

Refused: anything but UTF-8, byte-order marks, duplicate keys, NaN and infinities (also by overflow, ``1e999``),
integers beyond 64 bits, NUL and lone surrogates in strings, nesting deeper than 64, too many values, and files above
a size cap.
"""

import json
import math
import re
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema

from plans.errors import InputError, printable
from plans.reading.files import read_limited

MAX_DEPTH = 64
MAX_JSON_BYTES = 64 << 20
MAX_VALUES = 600_000
"""Of one document, objects and lists among them; some take half a kilobyte each while they are read."""
MAX_KEYS = 10_000
"""Of one object of ours. Validation keeps every key it does not know, at a kilobyte each, before the first is shown."""
_MAX_INT = 2**64
# An unterminated string runs to the end, so that no text makes the search start over again and again.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
# What only a careful reading tells apart from plain JSON: huge numbers, exponents, escaped NULs and surrogates.
_NEEDS_CARE = re.compile(rb"[0-9]{19}|[0-9][eE]|\\u")


_KINDS = {
    "a plan": {"stages", "proof", "profile"},
    "a cluster": {"hosts", "devices"},
    "a model profile": {"units", "total_parameters"},
    "the manifest of an export": {"export_id", "files"},
    "the configuration of a model": {"model_type", "hidden_size"},
}
"""Files that people give one in place of another -> keys that tell."""


def _stop_at_first(schema: Any) -> None:
    """Mark every list of a validation schema."""
    parts = schema.values() if isinstance(schema, dict) else schema
    if isinstance(schema, dict) and schema.get("type") in ("list", "tuple"):  # a model may have a field of that name
        schema["fail_fast"] = True
    for part in parts:
        if isinstance(part, dict | list):
            _stop_at_first(part)


class StrictModel(BaseModel):
    """Base of everything on disk: frozen, no unknown keys, no conversions, no NaN."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        populate_by_name=True,
        validate_default=True,
        ser_json_inf_nan="constants",
    )

    def to_json(self) -> str:
        """Return canonical JSON: sorted keys, two-space indent, a final newline, the same bytes every time."""
        return dump_json(self.model_dump(mode="json", by_alias=True))

    @classmethod
    def from_json(cls, data: bytes, *, where: object) -> Self:
        """Validate untrusted JSON bytes.

        Raises:
            InputError: naming the JSON pointer and what was expected there.
        """
        document = parse_json(data, where=where, max_keys=MAX_KEYS)
        for kind, keys in _KINDS.items():
            if isinstance(document, dict) and keys <= document.keys() and not keys <= cls.model_fields.keys():
                wanted = ", ".join(name for name, field in cls.model_fields.items() if field.is_required())
                raise InputError(f"is {kind}", where=where, expected=f"a file with {wanted}", code="E-SCHEMA")
        return validate_json(cls, data, where=where)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let validation stop at the first wrong item of a list: a million of them would cost a gigabyte."""
        schema = handler(source)
        _stop_at_first(schema)
        return schema

    @classmethod
    def read(cls, path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> Self:
        """Read and validate a file; errors as `read_limited` and `from_json`."""
        return cls.from_json(read_limited(path, max_bytes=max_bytes), where=path)


SchemaVersion = Annotated[int, Field(ge=1, le=1)]
"""Version of a file format. A strict integer: a Literal would also take 1.0 and true, which equal 1."""

ModelT = TypeVar("ModelT", bound=BaseModel)


def dump_json(value: object) -> str:
    """Return canonical JSON text of plain data."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse_json(data: bytes, *, where: object, max_values: int = MAX_VALUES, max_keys: int = MAX_VALUES) -> Any:
    """Parse JSON bytes strictly: at most `max_values` commas and opening brackets, and `max_keys` in one object.

    Raises:
        InputError: with line and column for syntax, or the offending key or value.
    """
    _check_shape(data, where, max_values)  # before it is text, of which one rare character makes four bytes of each
    text = _decode(data, where)
    is_plain = _NEEDS_CARE.search(data) is None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) > max_keys:
            raise InputError(f"an object has more than {max_keys} keys", where=where, code="E-TOO-LARGE")
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _value in pairs).items() if count > 1)
            raise InputError(f"duplicate key '{printable(twice)}'", where=where, code="E-JSON")
        return result

    try:
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=lambda name: _refuse_number(name, where),
            parse_int=None if is_plain else lambda digits: _checked_int(digits, where),
            parse_float=None if is_plain else lambda digits: _checked_float(digits, where),
        )
    except json.JSONDecodeError as error:
        raise InputError(
            f"not JSON: {error.msg}", where=f"{where}:{error.lineno}:{error.colno}", code="E-JSON"
        ) from None
    if not is_plain:
        _check_strings(value, where)
    return value


def validate_json(model: type[ModelT], data: bytes, *, where: object) -> ModelT:
    """Validate bytes that `parse_json` accepted; the first problem is reported with its JSON pointer."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise _explain(error, where) from None


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a file of at most `max_bytes` and parse it strictly."""
    return parse_json(read_limited(path, max_bytes=max_bytes), where=path)


def _explain(error: ValidationError, where: object) -> InputError:
    first = error.errors(include_url=False, include_context=False)[0]
    pointer = "".join(f"/{printable(part)}" for part in first["loc"])
    found = first["input"]
    shown = f" (found {printable(json.dumps(found), limit=60)})" if isinstance(found, int | float | str) else ""
    more = error.error_count() - 1
    return InputError(
        f"{first['msg'][0].lower()}{first['msg'][1:]}{shown}" + (f"; and {more} more problems" if more else ""),
        where=f"{where}:{pointer}" if pointer else where,
        code="E-SCHEMA",
    )


def _decode(data: bytes, where: object) -> str:
    if not data.strip():
        raise InputError("the file is empty", where=where, expected="a JSON document", code="E-JSON")
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise InputError("starts with a byte-order mark", where=where, expected="UTF-8 without one", code="E-JSON")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=where, code="E-JSON") from None


def _check_shape(data: bytes, where: object, max_values: int) -> None:
    # Each comma lies between two values, and a value with its key is two strings. Quotes are counted first: taking out
    # millions of strings costs hundreds of MiB.
    too_many = InputError(f"holds more than {max_values} values", where=where, code="E-TOO-LARGE")
    if data.count(b'"') - data.count(b'\\"') > 4 * max_values + 4:
        raise too_many
    plain, num_strings = _STRING.subn(b"", data, count=2 * max_values + 3)
    if num_strings > 2 * max_values + 2 or sum(map(plain.count, (b",", b"{", b"["))) > max_values:
        raise too_many
    brackets = plain.translate(None, _NOT_BRACKETS)
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MAX_DEPTH:
        raise InputError(f"nested deeper than {MAX_DEPTH} levels", where=where, code="E-JSON")


def _checked_int(digits: str, where: object) -> int:
    if len(digits) > 20 or not -_MAX_INT < int(digits) < _MAX_INT:
        raise InputError(
            f"the number {printable(digits, limit=30)} is too large",
            where=where,
            expected="an integer of at most 64 bits",
            code="E-JSON",
        )
    return int(digits)


def _checked_float(digits: str, where: object) -> float:
    value = float(digits)
    if not math.isfinite(value):
        _refuse_number(digits, where)
    return value


def _refuse_number(name: str, where: object) -> float:
    raise InputError(
        f"{printable(name, limit=30)} is not a finite number",
        where=where,
        expected="finite numbers",
        code="E-JSON",
    )


def _check_strings(value: Any, where: object) -> None:
    """Refuse NULs and lone surrogates, in keys as in values."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            _check_text(item, where)
        elif isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _check_text(text: str, where: object) -> None:
    if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
        raise InputError(
            f"the string '{printable(text, limit=40)}' holds a NUL or a lone surrogate",
            where=where,
            code="E-JSON",
        )
