"""What an engine needs to know of a model."""

from contextlib import AbstractContextManager
from typing import Protocol

from runtime.generate.text import Decode
from runtime.stage_time import StageWatch
from runtime.steps.parts import Steps


class Facts(Protocol):
    """What was known before loading; see `runtime.prepared.Prepared`."""

    @property
    def vocab_size(self) -> int:
        """Every token id is below it."""

    @property
    def context_tokens(self) -> int:
        """Tokens of a sequence at most."""

    @property
    def own_decode(self) -> Decode | None:
        """Token ids -> text, if it has a tokenizer."""

    def cache_bytes(self, num_tokens: int) -> tuple[int, ...]:
        """Return the bytes of a cache of so many tokens, per stage."""


class Model(Protocol):
    """A loaded model; see `runtime.session.Session` and `runtime.distributed.session.ProcessSession`."""

    @property
    def prepared(self) -> Facts:
        """What was known before loading."""

    def new_steps(self) -> Steps:
        """Return what computes steps; one engine at a time may use them."""

    def watch_stages(self) -> AbstractContextManager[StageWatch]:
        """Measure what the stages do inside the block."""
