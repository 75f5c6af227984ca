"""The engine in numbers, as Prometheus reads them."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.engine.counters import BOUNDS, Histogram
from runtime.engine.engine import Engine


class EngineMetrics(Collector):
    """Looks at an engine whenever somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """Yield every figure."""
        seen = self._engine.counters
        for name, what, value in (
            ("requests_running", "Requests that have a slot.", seen.num_running),
            ("requests_waiting", "Requests that wait for a slot.", seen.num_waiting),
            ("slots", "Requests that can run at once.", seen.num_slots),
            ("kv_tokens_used", "Tokens in the caches, kept ones included.", seen.kv_tokens_used),
            ("kv_tokens_reserved", "Tokens that running requests may come to.", seen.kv_tokens_reserved),
        ):
            yield GaugeMetricFamily(f"llamarun_{name}", what, value=value)
        for name, what, value in (
            ("prompt_tokens", "Prompt tokens of admitted requests.", seen.totals.num_prompt_tokens),
            ("cached_prompt_tokens", "Those that were in a slot already.", seen.totals.num_cached_tokens),
            ("generation_tokens", "New tokens.", seen.totals.num_new_tokens),
        ):
            yield CounterMetricFamily(f"llamarun_{name}", what, value=value)
        ended = CounterMetricFamily("llamarun_requests_finished", "Requests by how they ended.", labels=["reason"])
        for reason, count in sorted(seen.totals.endings.items()):
            ended.add_metric([reason], count)
        yield ended
        yield _histogram("time_to_first_token_seconds", "From asking to the first token.", seen.totals.first_token)
        yield _histogram("time_between_tokens_seconds", "From a token to the next one.", seen.totals.gaps)


def _histogram(name: str, what: str, found: Histogram) -> HistogramMetricFamily:
    counts, total = list(found.counts), 0
    buckets = []
    for bound, count in zip((*map(str, BOUNDS), "+Inf"), counts, strict=True):
        total += count
        buckets.append((bound, total))
    return HistogramMetricFamily(f"llamarun_{name}", what, buckets=buckets, sum_value=found.total_seconds)
