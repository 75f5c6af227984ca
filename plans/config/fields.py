"""Typed access to a parsed `config.json`, with errors that name the field and the range."""

import json
from collections.abc import Mapping
from typing import Any

from plans.errors import InputError, printable

MAX_COUNT = 1 << 24
_LIMITS = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 31,
    "num_experts": 1 << 16,
    "num_experts_per_tok": 1 << 16,
}


def as_stated(value: Any) -> str:
    """Return a value as the file spells it, not too long of it.

    >>> as_stated("3"), as_stated(None), as_stated(True)
    ('"3"', 'null', 'true')
    """
    return printable(json.dumps(value, ensure_ascii=False), limit=40)


class Fields:
    """Typed access to a configuration, with errors that name the field and the range."""

    def __init__(self, raw: Mapping[str, Any], where: object) -> None:
        self.raw = raw
        self.where = where

    def error(self, name: str, what: str, *, expected: str = "") -> InputError:
        """Return the error about one field, to be raised."""
        return InputError(what, where=f"{self.where}:/{name}", expected=expected, code="E-CONFIG")

    def count(self, name: str, *, default: int | None = None) -> int:
        """Return a whole number above zero; absent (or null, where there is a default) means the default."""
        return self.count_of((name,), limit=name, default=default)

    def count_of(self, names: tuple[str, ...], *, limit: str, default: int | None) -> int:
        """Return the first of several spellings, as `count` does."""
        name = next((n for n in names if n in self.raw), names[0])
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        most = _LIMITS.get(limit, MAX_COUNT)
        if type(value) is not int or not 1 <= value <= most:
            found = "is missing" if name not in self.raw else f"is {as_stated(value)}"
            raise self.error(name, found, expected=f"an integer from 1 to {most}")
        return value

    def whole(self, name: str) -> int:
        """Return a whole number, 0 where it is absent or null."""
        return self.count(name) if self.raw.get(name) not in (None, 0) else 0

    def flag(self, name: str, *, default: bool) -> bool:
        """Return true or false; absent or null means the default."""
        value = self.raw.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(name, f"is {as_stated(value)}", expected="true or false")
        return value

    def text(self, name: str) -> str:
        """Return a name that must be there."""
        value = self.raw.get(name)
        if not isinstance(value, str) or not value:
            found = "is missing" if value is None else f"is {as_stated(value)}"
            raise self.error(name, found, expected="a name such as 'llama'")
        return value

    def number(self, table: Mapping[str, Any], name: str, path: str) -> float:
        """Return a number above zero out of the table that lies at `path`."""
        value = table.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            found = "is missing" if name not in table else f"is {as_stated(value)}"
            raise self.error(f"{path}/{name}", found, expected="a number above 0")
        return float(value)
