"""What is asked of the model: how many tokens, how many sequences, in which dtypes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from plans.cluster import Seconds
from plans.dtypes import DtypeName
from plans.errors import InputError
from plans.reading.files import read_limited
from plans.reading.strict import StrictModel

MAX_TOKENS = 2**31
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
BatchSize = Annotated[int, Field(ge=1, le=65536)]


class Workload(StrictModel):
    """One kind of request. `context_tokens` sizes the KV cache; it holds at least prompt + new tokens."""

    prompt_tokens: Tokens = 128
    new_tokens: Annotated[int, Field(ge=0, le=2**31)] = 128
    context_tokens: Tokens
    batch_size: BatchSize = 1
    requests_in_flight: BatchSize = 1
    prefill_chunk_tokens: Tokens
    """Prompt tokens per prefill step; the whole prompt if not smaller."""
    dtype: DtypeName
    kv_cache_dtype: DtypeName

    @model_validator(mode="after")
    def _fits_the_context(self) -> "Workload":
        needed = self.prompt_tokens + self.new_tokens
        if needed > self.context_tokens:
            raise ValueError(
                f"prompt_tokens {self.prompt_tokens} + new_tokens {self.new_tokens} = {needed} "
                f"exceed context_tokens {self.context_tokens}"
            )
        return self

    @property
    def decode_context_tokens(self) -> int:
        """The context at which decode is costed: prompt + half of the new tokens."""
        return self.prompt_tokens + self.new_tokens // 2

    @property
    def prefill_chunks(self) -> tuple[tuple[int, int], ...]:
        """(tokens, past tokens) of every prefill step of the prompt."""
        size = min(self.prefill_chunk_tokens, self.prompt_tokens)
        return tuple((min(size, self.prompt_tokens - past), past) for past in range(0, self.prompt_tokens, size))


MAX_CHUNKS_READ, MAX_TOKENS_READ = 2, 256
"""Between two steps of those who decode; a single chunk may be longer."""


def may_read_on(read: Sequence[int], num_tokens: int) -> bool:
    """Whether one more chunk of a prompt is read before it is the turn of those who decode.

    Two short chunks rather than one: with many prompts to read, half as many steps have few sequences in them. A stream
    then stands still for two chunks and a step at most.

    Args:
        read: tokens of the chunks that were read since they had their turn.
        num_tokens: of the next one.
    """
    return not read or (len(read) < MAX_CHUNKS_READ and sum(read) + num_tokens <= MAX_TOKENS_READ)


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
