"""A record of requests: one JSON object per line, saying when a request came and how long it was."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from plans.cluster import Seconds
from plans.errors import InputError
from plans.reading.files import read_limited
from plans.reading.strict import StrictModel
from plans.workload import Tokens

MAX_REQUESTS = 100_000
MAX_FILE_BYTES = 16 << 20


class Request(StrictModel):
    """One request: a batch of prompts that arrive together."""

    arrival_seconds: Seconds = 0.0
    """After the start of the record."""
    prompt_tokens: Tokens
    new_tokens: Annotated[int, Field(ge=1, le=2**31)]


def read_requests(path: Path) -> tuple[Request, ...]:
    """Return the requests of a file in the order of their arrival; those of one moment keep the file's order.

    Raises:
        InputError: missing, empty, too long, or a line that is no request.
        MachineError: not readable.
    """
    lines = read_limited(path, max_bytes=MAX_FILE_BYTES).split(b"\n")
    found = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InputError("holds no request", where=path, expected="one JSON object per line")
    if len(found) > MAX_REQUESTS:
        raise InputError(f"holds {len(found)} requests", where=path, expected=f"at most {MAX_REQUESTS}")
    requests = [Request.from_json(line, where=f"{path}:{number}") for number, line in found]
    return tuple(sorted(requests, key=lambda request: request.arrival_seconds))
