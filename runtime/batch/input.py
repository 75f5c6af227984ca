"""The lines `llamarun batch` reads: one JSON object each, strict, and what they become."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from plans.errors import InputError, LlamaplanError, UsageError, printable
from plans.reading.files import read_limited
from plans.reading.strict import StrictModel
from runtime.chat.conversation import SavedMessage
from runtime.chat.template import ChatTemplate
from runtime.generate.limits import Limits, check_prompt
from runtime.generate.request import Request
from runtime.generate.sampling import Sampling
from runtime.prepared import Prepared
from runtime.reading.tokenizer import encode_prompt

MAX_INPUT_BYTES = 1 << 30


class BatchLine(StrictModel):
    """One line: a prompt or a conversation, and settings that replace the command's."""

    id: str | int | None = None
    prompt: str | None = None
    messages: Annotated[tuple[SavedMessage, ...], Field(min_length=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[Annotated[str, Field(min_length=1)], ...] | None = None

    @model_validator(mode="after")
    def _has_one_text(self) -> "BatchLine":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either a prompt or messages")
        return self


@dataclass(frozen=True, slots=True)
class Job:
    """One line, ready to run.

    Attributes:
        index: its place among the lines, from 0 (blank lines are left out).
        id: what the line calls itself, or None.
        request: what to generate.
        num_tokens: the most tokens it can become, prompt included.
        sha256: hash of everything its result depends on.
    """

    index: int
    id: str | int | None
    request: Request
    num_tokens: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for lines that say nothing else."""

    sampling: Sampling
    limits: Limits


def read_jobs(path: Path, prepared: Prepared, defaults: Defaults, *, model_id: str) -> list[Job]:
    """Read every line, before anything runs.

    Args:
        path: the file, one JSON object per line.
        prepared: the model's tokenizer and limits.
        defaults: settings of lines that have none of their own.
        model_id: what tells the model from others.

    Raises:
        InputError: a line is malformed, has an unknown key, or repeats an id; names the line.
        UsageError: a setting is out of range, or a prompt does not fit the context; names the line.
    """
    lines = [
        (number, data)
        for number, data in enumerate(read_limited(path, max_bytes=MAX_INPUT_BYTES).split(b"\n"), start=1)
        if data.strip()
    ]
    if not lines:
        raise InputError("holds no lines", where=path, expected='{"prompt": "..."} on each', code="E-BATCH")
    parsed = [(f"{path}:{number}", BatchLine.from_json(data, where=f"{path}:{number}")) for number, data in lines]
    _refuse_same_ids(parsed)
    with ChatTemplate(prepared.source.folder, vocab_size=prepared.vocab_size) as template:
        return [
            _job(index, line, prepared, template, defaults, model_id=model_id, where=where)
            for index, (where, line) in enumerate(parsed)
        ]


def _refuse_same_ids(lines: Sequence[tuple[str, BatchLine]]) -> None:
    seen: dict[str, str] = {}
    for where, line in lines:
        key = json.dumps(line.id)
        if line.id is not None and key in seen:
            raise InputError(
                f"the id {printable(key, limit=60)} is that of {seen[key]} too", where=where, code="E-BATCH"
            )
        seen[key] = where


def _job(
    index: int,
    line: BatchLine,
    prepared: Prepared,
    template: ChatTemplate,
    defaults: Defaults,
    *,
    model_id: str,
    where: str,
) -> Job:
    try:
        ids = _encode(line, prepared, template)
        sampling = _sampling(line, prepared, defaults.sampling)
        limits = replace(
            defaults.limits,
            max_tokens=defaults.limits.max_tokens if line.max_tokens is None else line.max_tokens,
            stop_strings=defaults.limits.stop_strings if line.stop is None else line.stop,
            is_stop=defaults.limits.is_stop if line.stop is None else None,
        )
        room = check_prompt(ids, limits, vocab_size=prepared.vocab_size, where="")
    except LlamaplanError as error:
        what = f"{error.where}: {error.what}" if error.where else error.what
        raise type(error)(what, where=where, expected=error.expected, hint=error.hint, code=error.code) from None
    # A line with a seed of its own gets what `generate --seed` gives; the others differ by their place in the file.
    sequence_index = index if line.seed is None else 0
    request = Request(prompt_ids=ids, sampling=sampling, limits=limits, sequence_index=sequence_index)
    return Job(index, line.id, request, len(ids) + room, _hash(request, line, model_id))


def _encode(line: BatchLine, prepared: Prepared, template: ChatTemplate) -> list[int]:
    if line.messages is not None:
        return template.encode([message.model_dump() for message in line.messages])
    return encode_prompt(prepared.tokenizer, line.prompt or "", parses_special=False)


def _sampling(line: BatchLine, prepared: Prepared, default: Sampling) -> Sampling:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    stated: dict[str, Any] = {name: value for name in names if (value := getattr(line, name)) is not None}
    if stated.get("top_k", 0) > prepared.vocab_size:
        raise UsageError(f"top_k {stated['top_k']} is more than the vocabulary has ({prepared.vocab_size})")
    return replace(default, **stated)


def _hash(request: Request, line: BatchLine, model_id: str) -> str:
    """Hash what the tokens depend on; how the prompt is cut into steps only rounds differently."""
    limits = request.limits
    facts = {
        "model": model_id,
        "id": line.id,
        "prompt_ids": list(request.prompt_ids),
        "sampling": {name: value for name, value in asdict(request.sampling).items() if name != "rules"},
        "sequence_index": request.sequence_index,
        "max_tokens": limits.max_tokens,
        "context_tokens": limits.context_tokens if limits.max_tokens is None else None,
        "eos_token_ids": sorted(limits.eos_token_ids),
        "stop_strings": list(limits.stop_strings),
    }
    facts |= _checkpoint_facts(request)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _checkpoint_facts(request: Request) -> dict[str, Any]:
    """What the checkpoint asks beside; left out where it asks nothing, so that older results stay what they are."""
    limits = request.limits
    lengths = (
        {}
        if limits.max_tokens is not None
        else {
            "max_new_tokens": limits.default_max_tokens,
            "max_length": limits.max_length,
        }
    )
    facts = {**lengths, "rules": dict(request.sampling.rules)}
    return {name: value for name, value in facts.items() if value}
