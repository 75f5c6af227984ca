"""A cache kept from one prompt to the next where every stage has its own: `runtime.generate.kept_cache` from afar."""

from collections.abc import Callable, Sequence
from itertools import takewhile

from runtime.distributed.flow import HeldCache


class KeptColumns:
    """The token ids of a cache that lies on all stages.

    Args:
        forget: gives a cache up on every stage.
        can_be_cut: whether the end of a cache can be taken back; a sliding window that has moved on cannot.
    """

    def __init__(self, forget: Callable[[HeldCache], None], *, can_be_cut: bool) -> None:
        self._forget = forget
        self._can_be_cut = can_be_cut
        self._token_ids: list[int] = []
        self._cache = HeldCache()

    @property
    def num_tokens(self) -> int:
        """Tokens the cache holds."""
        return len(self._token_ids)

    def reset(self) -> None:
        """Forget everything, for example after a run that did not end."""
        self._forget(self._cache)
        self._token_ids = []
        self._cache = HeldCache()

    def match(self, prompt_ids: Sequence[int]) -> HeldCache:
        """Return the cache cut back to the longest beginning it shares with a prompt, the last token left out."""
        pairs = zip(self._token_ids, prompt_ids[:-1], strict=False)
        num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if num_shared < len(self._token_ids) and not self._can_be_cut:
            self.reset()
            num_shared = 0
        del self._token_ids[num_shared:]
        self._cache.keeps = num_shared
        return self._cache

    def keep(self, token_ids: Sequence[int], cache: HeldCache) -> None:
        """Keep a cache after a run; `token_ids` are the prompt and what followed."""
        self._cache = cache
        self._token_ids = list(token_ids[: cache.columns])
