"""What is asked of the model, and what comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.generate.limits import Limits
from runtime.generate.sampling import Sampling
from runtime.generate.text import Decode
from runtime.generate.writer import GeneratedSequence, OnText, SequenceWriter
from runtime.stage_time import StageTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to continue.

    Attributes:
        prompt_ids: token ids, not empty.
        sampling: how its tokens are chosen.
        limits: when it stops.
        sequence_index: decides, with the seed, its random draws; its place in a batch does not.
        num_top: how many likeliest tokens are told beside the chosen one's likelihood; None for neither.
        tells_prompt: whether the same is told for the tokens of the prompt.
    """

    prompt_ids: Sequence[int]
    sampling: Sampling
    limits: Limits
    sequence_index: int = 0
    num_top: int | None = None
    tells_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated and how long it took. Seconds are wall-clock seconds."""

    sequences: tuple[GeneratedSequence, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that were in a cache already and were not read again."""
    time_to_first_token_seconds: float
    step_seconds: tuple[float, ...]
    """One entry per token of the longest sequence after its first one: forward, choice of the token, and text."""
    prefill_stages: StageTimes
    decode_stages: StageTimes
    """Per stage; empty when stage times were not asked for."""

    @property
    def num_new_tokens(self) -> int:
        """New tokens of all sequences together."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first of each sequence per second of decoding; 0 when there were none."""
        seconds = sum(self.step_seconds)
        return (self.num_new_tokens - len(self.sequences)) / seconds if seconds else 0.0


def make_writer(
    request: Request, *, place: int, room: int, decode: Decode | None, on_text: OnText | None
) -> SequenceWriter:
    """Return what collects the tokens of a request: at most `room` of them."""
    return SequenceWriter(
        place,
        prompt_ids=request.prompt_ids,
        max_tokens=room,
        eos_token_ids=request.limits.eos_token_ids,
        stop_strings=request.limits.stop_strings,
        is_stop=request.limits.is_stop,
        decode=decode,
        on_text=on_text,
    )
