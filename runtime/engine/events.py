"""What becomes of a request, piece by piece; told in the engine's thread, which must not be kept waiting."""

from collections.abc import Callable
from dataclasses import dataclass

from plans.errors import LlamaplanError
from plans.run import FinishReason
from runtime.steps.parts import Likely


@dataclass(frozen=True, slots=True)
class PromptRead:
    """A piece of the prompt was read; how likely its tokens were, if that was asked for, from the second one on."""

    likely: tuple[Likely, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """A new token.

    Attributes:
        token_id: the token; one that ends the sequence is told too.
        text: what became certain with it; often a word, sometimes nothing.
        likely: how likely it was, if that was asked for.
    """

    token_id: int
    text: str
    likely: Likely | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request."""

    num_prompt_tokens: int
    num_new_tokens: int
    num_cached_tokens: int
    """Prompt tokens that a slot had kept and that were not read again."""


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of a request that went well, or was interrupted."""

    finish_reason: FinishReason
    usage: Usage
    text: str
    """What was held back until then, where it was interrupted; else empty."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that did not."""

    error: LlamaplanError


Event = PromptRead | Token | Done | Failed
OnEvent = Callable[[Event], None]
