"""How much cache there is, in exact bytes per stage, and what a sequence needs of it."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from plans.errors import UsageError
from plans.reading.sizes import format_bytes
from runtime.engine.model import Facts

Bytes = tuple[int, ...]
"""Per stage, in chain order."""


@dataclass(frozen=True, eq=False)
class Budget:
    """Cache bytes of every stage.

    Attributes:
        facts: about the model.
        limits: bytes for caches, per stage.
    """

    facts: Facts
    limits: Bytes

    @classmethod
    def of(cls, facts: Facts, *, num_sequences: int, cache_tokens: int | None = None) -> "Budget":
        """Return room for so many sequences of so many tokens: what loading has found to be there.

        Args:
            facts: about the model, such as a session's `prepared`.
            num_sequences: as `batch_size` of loading.
            cache_tokens: as `cache_tokens` of loading; None for the whole context.
        """
        tokens = min(cache_tokens or facts.context_tokens, facts.context_tokens)
        return cls(facts, tuple(num_sequences * size for size in facts.cache_bytes(tokens)))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence that fits alone."""
        counts = range(1, self.facts.context_tokens + 1)
        return bisect_right(counts, 0, key=lambda count: int(not self.has_room([count])))

    @lru_cache(maxsize=4096)  # noqa: B019 - a budget lives as long as its engine
    def need(self, num_tokens: int) -> Bytes:
        """Return what the cache of a sequence of so many tokens takes."""
        return self.facts.cache_bytes(num_tokens)

    def has_room(self, num_tokens: Iterable[int]) -> bool:
        """Whether caches of so many tokens each fit together."""
        return all(sum(needs) <= limit for *needs, limit in zip(*map(self.need, num_tokens), self.limits, strict=True))

    def check(self, num_tokens: int) -> None:
        """Require that a sequence fits alone.

        Raises:
            UsageError: with both numbers.
        """
        for stage, (need, limit) in enumerate(zip(self.need(num_tokens), self.limits, strict=True)):
            if need > limit:
                raise UsageError(
                    f"{num_tokens} tokens need {format_bytes(need)} ({need} bytes) of cache in stage {stage}, "
                    f"which has {format_bytes(limit)} ({limit} bytes) for all sequences",
                    hint="shorten the prompt, or ask for fewer new tokens",
                    code="E-ROOM",
                )
