"""What both collections share: the register of cases, and the tools they break files with."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BAD_INPUT, INTEGRITY, MACHINE = 3, 5, 6
Break = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One broken folder."""

    row: str
    """Row of the faults table."""
    code: int
    """Exit code it must lead to."""
    break_folder: Break

    @property
    def name(self) -> str:
        """The function's name is the case's."""
        return getattr(self.break_folder, "__name__", "")


class Collection(dict[str, Case]):
    """Cases by name."""

    def case(self, row: str, code: int) -> Callable[[Break], Break]:
        """Register the function below."""

        def register(function: Break) -> Break:
            self[function.__name__] = Case(row, code, function)
            return function

        return register


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def read_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return header table and data of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_shard(path: Path, table: object, data: bytes) -> None:
    """Write header table (or its raw bytes) and data as a safetensors file."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def make_by_hand(collection: Collection, good: Path, arguments: list[str]) -> None:
    """Write one case to a folder, for a look at it."""
    name, target = arguments
    shutil.copytree(good, target)
    collection[name].break_folder(Path(target))
