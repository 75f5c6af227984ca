"""How much cache there is, in exact bytes per stage, and what a sequence needs of it."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from plans.errors import UsageError
from plans.reading.sizes import format_bytes
from runtime.prepared import Prepared
from runtime.reading.capacity import kv_cache_bytes

Bytes = tuple[int, ...]
"""Per stage, in chain order."""


@dataclass(frozen=True, eq=False)
class Budget:
    """Cache bytes of every stage.

    Attributes:
        prepared: the model.
        limits: bytes for caches, per stage.
    """

    prepared: Prepared
    limits: Bytes

    @classmethod
    def of(cls, prepared: Prepared, *, num_sequences: int, cache_tokens: int | None = None) -> "Budget":
        """Return room for so many sequences of so many tokens: what loading has found to be there.

        Args:
            prepared: the model.
            num_sequences: as `batch_size` of loading.
            cache_tokens: as `cache_tokens` of loading; None for the whole context.
        """
        tokens = min(cache_tokens or prepared.context_tokens, prepared.context_tokens)
        return cls(prepared, tuple(num_sequences * size for size in cls(prepared, ()).need(tokens)))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence that fits alone."""
        context = self.prepared.context_tokens
        return bisect_right(range(1, context + 1), 0, key=lambda tokens: 0 if self.has_room([tokens]) else 1)

    @lru_cache(maxsize=4096)  # noqa: B019 - a budget lives as long as its engine
    def need(self, num_tokens: int) -> Bytes:
        """Return what the cache of a sequence of so many tokens takes."""
        config, dtype = self.prepared.source.checkpoint.config, self.prepared.kv_cache_dtype
        return tuple(
            kv_cache_bytes(config, stage, kv_cache_dtype=dtype, context_tokens=num_tokens)
            for stage in self.prepared.source.stages
        )

    def has_room(self, num_tokens: Iterable[int]) -> bool:
        """Whether caches of so many tokens each fit together."""
        return all(sum(needs) <= limit for *needs, limit in zip(*map(self.need, num_tokens), self.limits, strict=True))

    def check(self, num_tokens: int) -> None:
        """Require that a sequence fits alone.

        Raises:
            UsageError: with both numbers.
        """
        for stage, need, limit in zip(self.prepared.source.stages, self.need(num_tokens), self.limits, strict=True):
            if need > limit:
                raise UsageError(
                    f"{num_tokens} tokens need {format_bytes(need)} ({need} bytes) of cache on {stage.device}, "
                    f"which has {format_bytes(limit)} ({limit} bytes) for all sequences",
                    hint="shorten the prompt, or ask for fewer new tokens",
                    code="E-ROOM",
                )
