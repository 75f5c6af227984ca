"""What commands need of a session, whether its stages share this process or not."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from runtime.generate.loop import Generation, Request
from runtime.generate.text import Decode
from runtime.generate.writer import OnText
from runtime.reading.opening import Source
from runtime.session import Prepared
from runtime.stage_view import StageView
from runtime.steps import OnStep


class AnyKeptCache(Protocol):
    """A cache kept between turns; see `runtime.generate.kept_cache.KeptCache`."""

    @property
    def num_tokens(self) -> int: ...
    def reset(self) -> None: ...
    def match(self, prompt_ids: Sequence[int]) -> Any: ...
    def keep(self, token_ids: Sequence[int], cache: Any) -> None: ...


class AnySession(Protocol):
    """A loaded model; see `runtime.session.Session` and `runtime.distributed.session.ProcessSession`."""

    @property
    def prepared(self) -> Prepared: ...
    @property
    def source(self) -> Source: ...
    @property
    def load_seconds(self) -> float: ...
    @property
    def dtype_name(self) -> str: ...
    @property
    def peak_memory_bytes(self) -> int: ...
    def generate_groups(
        self,
        groups: Sequence[Sequence[Request]],
        *,
        in_flight: int,
        decode: Decode | None = None,
        on_done: Callable[[int, Generation], None],
    ) -> None: ...
    def new_kept_cache(self) -> AnyKeptCache: ...
    def read_bandwidth(self, *, repeats: int) -> dict[str, float]: ...
    def stage_views(self, *, batch_size: int) -> tuple[StageView, ...]: ...
    def generate_requests(
        self,
        requests: Sequence[Request],
        *,
        decode: Decode | None = None,
        on_text: OnText | None = None,
        on_step: OnStep | None = None,
        should_stop: Callable[[], bool] | None = None,
        cache: Any = None,
        measure_stages: bool = False,
    ) -> Generation: ...
