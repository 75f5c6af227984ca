"""A KV cache kept from one prompt to the next: only tokens that are not in it yet are read."""

from collections.abc import Sequence
from itertools import takewhile

from transformers.cache_utils import Cache

from runtime.stages.chain import Chain


class KeptCache:
    """A cache and the token ids it holds.

    Args:
        chain: the model it belongs to.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._token_ids: list[int] = []
        self._cache: Cache = chain.new_cache()

    @property
    def num_tokens(self) -> int:
        """Tokens the cache holds."""
        return len(self._token_ids)

    def reset(self) -> None:
        """Forget everything, for example after a forward that did not end."""
        self._token_ids = []
        self._cache = self._chain.new_cache()

    def match(self, prompt_ids: Sequence[int]) -> Cache:
        """Return the cache cut back to the longest beginning it shares with a prompt, the prompt's last token left out.

        A sliding window that has moved on cannot be cut back; then everything is read again.
        """
        pairs = zip(self._token_ids, prompt_ids[:-1], strict=False)
        num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        surplus = len(self._token_ids) - num_shared
        if surplus and not self._crop(surplus):
            self.reset()
        del self._token_ids[num_shared:]
        return self._cache

    def keep(self, token_ids: Sequence[int], cache: Cache) -> None:
        """Keep a cache after a run.

        Args:
            token_ids: the prompt and what followed; the cache may lack the last of them.
            cache: the cache of the run.
        """
        self._cache = cache
        self._token_ids = list(token_ids[: int(cache.get_seq_length())])

    def _crop(self, num_tokens: int) -> bool:
        try:
            self._cache.crop(-num_tokens)
        except RuntimeError:
            return False
        return True
