"""What a client may ask, strictly: what is not understood is refused by name, never ignored."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from plans.errors import InputError
from plans.reading.strict import StrictModel, parse_json
from runtime.serve.refusals import Refused

MAX_VALUES = 4_000_000
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
COMPLETION_TOKENS = 16
"""New tokens of a completion that says nothing, as OpenAI's."""

Text = Annotated[str, Field(min_length=1, max_length=1000)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenIds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's and others' that nothing here does, and the values (null beside them) that ask for nothing."""


class StreamOptions(StrictModel):
    """What else a stream says."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextPart(StrictModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...]

    def plain(self) -> dict[str, str]:
        """Return what a template takes; OpenAI's newer name of a system message is not known to any."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Settings(StrictModel):
    """What both kinds of requests have."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[tuple[Text, ...], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] | None = None
    logit_bias: dict[TokenName, Bias] | None = None
    ignore_eos: bool | None = None
    user: str | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(Settings):
    """`POST /v1/chat/completions`."""

    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def num_new_tokens(self) -> int | None:
        """New tokens at most; None until the end of the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_top(self) -> int | None:
        """Likeliest tokens that are told beside each one's likelihood; None for neither."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Settings):
    """`POST /v1/completions`."""

    prompt: Annotated[str, Field(min_length=1)] | TokenIds | Annotated[tuple[str | TokenIds, ...], Field(min_length=1)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """Texts or token ids."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        first = self.prompt[0]
        return (self.prompt,) if isinstance(first, int) else self.prompt  # type: ignore[return-value]

    @property
    def num_new_tokens(self) -> int:
        """New tokens at most."""
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_top(self) -> int | None:
        """As `ChatRequest.num_top`."""
        return self.logprobs


class TokenizeRequest(StrictModel):
    """`POST /tokenize`."""

    model: str | None = None
    prompt: str


class DetokenizeRequest(StrictModel):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds


RequestT = TypeVar("RequestT", bound=StrictModel)


def read_request(kind: type[RequestT], body: bytes) -> RequestT:
    """Return the request in a body.

    Raises:
        Refused: it is no JSON, no text, or asks for something else.
    """
    try:
        document = parse_json(body, where="body", max_values=MAX_VALUES)
    except InputError as error:
        raise Refused(400, "the body is not JSON of Unicode text", code="invalid_json") from error
    if not isinstance(document, dict):
        raise Refused(400, "the body is not a JSON object", code="invalid_json")
    for name in document.keys() & _NEUTRAL.keys():
        value = document.pop(name)
        if value is not None and value not in _NEUTRAL[name]:
            raise Refused(400, f"{name} is not supported here", code="unsupported", param=name)
    try:
        return kind.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise _malformed(error) from None


def _malformed(error: ValidationError) -> Refused:
    """Say which field is wrong, without its value, and without its name where a client made that up."""
    first = error.errors(include_input=False, include_context=False, include_url=False)[0]
    is_name = re.compile(r"[a-z][a-z_]{0,39}").fullmatch
    path = [str(part) for part in first["loc"] if isinstance(part, int) or is_name(str(part))]
    where = ".".join(path) or "a field"
    if first["type"] == "extra_forbidden":
        return Refused(
            400, f"{where} is not a field of this request", code="unknown_field", param=path[0] if path else None
        )
    return Refused(400, f"{where}: {first['msg']}", code="invalid_value", param=path[0] if path else None)
