"""A step: tokens of several sequences that go through the model together, and what comes back for each of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, Self

from pydantic import Field

from plans.errors import NumericalError
from plans.reading.strict import StrictModel
from runtime.generate.request import Request
from runtime.generate.sampling import Sampling

Natural = Annotated[int, Field(ge=0, le=2**63 - 1)]

TOKEN, PROMPT = 1, 2
"""What a part gives back, to be added up: the next token; how likely each token of the prompt that follows was."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of one sequence in a step.

    Attributes:
        sequence: whose they are.
        start: tokens of the sequence that were computed before.
        count: how many.
        gives: `TOKEN`, `PROMPT`, their sum, or 0.
        fault: 1 + the first stage whose output was not finite; 0 while all is well.
    """

    sequence: int
    start: int
    count: int
    gives: int
    fault: int = 0

    @property
    def end(self) -> int:
        """Tokens of the sequence that are computed afterwards."""
        return self.start + self.count

    @property
    def num_rows(self) -> int:
        """Rows of the answer: one per token of the prompt that was looked at, and one for the next token."""
        return (self.count if self.gives & PROMPT else 0) + (self.gives & TOKEN)


class Drawing(StrictModel):
    """How the tokens of a sequence are chosen; see `Sampling` and `Ending` in `runtime.generate`."""

    temperature: float
    top_k: Natural
    top_p: float
    min_p: float | None
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: dict[int, float]
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    rules: dict[str, Any]
    sequence_index: Natural
    max_length: Natural
    eos_token_ids: tuple[Natural, ...]
    num_top: Natural | None
    """How many likeliest tokens are told beside the chosen one's likelihood; None for neither."""

    @property
    def width(self) -> int:
        """Numbers per row of an answer: the token, and what is told about how likely it was."""
        return 1 if self.num_top is None else 2 + 2 * self.num_top

    def sampling(self) -> Sampling:
        """Return the settings."""
        others = {"sequence_index", "max_length", "eos_token_ids", "num_top"}
        return Sampling(**self.model_dump(exclude=others))


class Opening(StrictModel):
    """What a stage has to know of a sequence before its first step."""

    sequence: Natural
    num_prompt_tokens: Natural
    num_tokens: Natural
    """Prompt and new tokens at most."""
    slot: Natural
    """Where its cache lies; nobody else's lies there until it is closed."""
    keeps_tokens: Natural = 0
    """Tokens of the slot that stay, from whoever had it before."""
    num_slots: Natural
    capacity: Natural
    """Tokens that fit into a slot; like the number of slots the same for all sequences."""
    drawing: Drawing | None = None
    """For the stage with the head."""
    prompt_ids: tuple[Natural, ...] = ()
    """There too, if choices depend on them; else empty."""

    def for_others(self) -> Self:
        """Return what is enough for a stage without the head."""
        return self.model_copy(update={"drawing": None, "prompt_ids": ()})


def opening_of(
    request: Request,
    *,
    sequence: int,
    slot: int,
    num_tokens: int,
    num_slots: int,
    capacity: int,
    keeps_tokens: int = 0,
) -> Opening:
    """Return what the stages have to know of a request that may come to `num_tokens` tokens."""
    sampling = request.sampling
    needs_prompt = sampling.depends_on_tokens or request.tells_prompt
    drawing = Drawing(
        temperature=float(sampling.temperature),
        top_k=sampling.top_k,
        top_p=float(sampling.top_p),
        min_p=None if sampling.min_p is None else float(sampling.min_p),
        repetition_penalty=float(sampling.repetition_penalty),
        frequency_penalty=float(sampling.frequency_penalty),
        presence_penalty=float(sampling.presence_penalty),
        logit_bias={token: float(bias) for token, bias in sampling.logit_bias.items()},
        seed=sampling.seed,
        rules=dict(sampling.rules),
        sequence_index=request.sequence_index,
        max_length=num_tokens,
        eos_token_ids=tuple(sorted(request.limits.eos_token_ids)),
        num_top=request.num_top,
    )
    return Opening(
        sequence=sequence,
        num_prompt_tokens=len(request.prompt_ids),
        num_tokens=num_tokens,
        slot=slot,
        keeps_tokens=keeps_tokens,
        num_slots=num_slots,
        capacity=capacity,
        drawing=drawing,
        prompt_ids=tuple(request.prompt_ids) if needs_prompt else (),
    )


@dataclass(frozen=True, slots=True)
class Likely:
    """How likely a token was, before anything was done to the scores.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens with theirs, in order.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one part.

    Attributes:
        part: the part, with its fault.
        token: the next token; None if none was asked for, or none could be chosen.
        likely: how likely it was, if that was asked for.
        prompt: the same for the tokens of the prompt after the part's first one, if asked for.
        error: why none could be chosen.
    """

    part: Part
    token: int | None = None
    likely: Likely | None = None
    prompt: tuple[Likely, ...] = ()
    error: NumericalError | None = None


class Steps(Protocol):
    """What computes steps: a chain in this process, or one that goes on in others."""

    @property
    def numbers(self) -> Iterator[int]:
        """Numbers for sequences; none comes twice."""

    @property
    def depth(self) -> int:
        """Steps that can be under way at once."""

    @property
    def has_room(self) -> bool:
        """Whether one more step can be sent now."""

    @property
    def most_slots(self) -> int | None:
        """Sequences that can have a slot at once without changing each other's numbers; None for any."""

    @property
    def rope_switch(self) -> int | None:
        """Length past which a sequence is computed again; see `runtime.reading.families.rope_switch`."""

    @property
    def can_be_cut(self) -> bool:
        """Whether the end of a cache can be taken back; a sliding window that has moved on cannot."""

    def open(self, opening: Opening) -> None:
        """Make room for a sequence."""

    def close(self, sequence: int, *, slot: int, keeps: bool) -> None:
        """Forget a sequence, and its slot's tokens too unless somebody may go on from there; may come twice."""

    def send(self, parts: Sequence[Part], token_ids: Sequence[int]) -> None:
        """Start a step; answers may be there when this returns, or later."""

    def take(self, *, waits: bool) -> list[Answer] | None:
        """Return the answers of a step that is done; None if there is none, after `wake` if it waits.

        Raises:
            LlamaplanError: nothing more will be computed.
            Forgotten: all caches are lost, and everything has to be sent again.
        """

    def wake(self) -> None:
        """Let `take` return; from any thread."""

    def explain(self, part: Part, token_ids: Sequence[int], *, step: int) -> NumericalError:
        """Return what is wrong with a part that has a fault."""


class Forgotten(Exception):  # noqa: N818 - not an error: nothing is lost but time
    """The stages were started again and know nothing of any sequence."""
