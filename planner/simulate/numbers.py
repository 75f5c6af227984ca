"""A simulation of requests in a few numbers: throughput, percentiles, who was busy."""

from dataclasses import dataclass

import numpy as np

from planner.simulate.serving import Seconds, Serving


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity over all requests or tokens, in seconds; p90 is the least value that 90 % do not exceed."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class ServingNumbers:
    """What a person wants to know of a `Serving`."""

    num_requests: int
    in_flight: int
    seconds: float
    """From the first arrival until the last request is done."""
    tokens_per_second: float
    requests_per_second: float
    mean_in_flight: float
    """Requests in the chain, on average over the time."""
    time_to_first_token: Spread
    """From the arrival; waiting for a place is part of it."""
    time_per_token: Spread | None
    """Between two tokens of a request; None where all requests have one token."""
    waiting: Spread
    """From the arrival until the request is let into the chain."""
    latency: Spread
    """From the arrival until the request is done."""
    busy_shares: dict[str, float]
    """How much of the time each device and link was busy, in the order of the chain."""
    falls_behind: bool
    """Whether more arrived than the chain can serve: a tenth more per second than was done, and a queue at the end."""


def numbers_of(serving: Serving) -> ServingNumbers:
    """Return the numbers of a simulation."""
    seconds = float(serving.finished.max() - serving.arrived[0])
    served = serving.finished - serving.admitted
    has_gaps = len(serving.token_gaps) > 0
    return ServingNumbers(
        num_requests=len(serving.arrived),
        in_flight=serving.in_flight,
        seconds=seconds,
        tokens_per_second=serving.num_tokens / max(seconds, 1e-12),
        requests_per_second=len(serving.arrived) / max(seconds, 1e-12),
        mean_in_flight=float(served.sum()) / max(seconds, 1e-12),
        time_to_first_token=spread(serving.first_token - serving.arrived),
        time_per_token=spread(serving.token_gaps) if has_gaps else None,
        waiting=spread(serving.admitted - serving.arrived),
        latency=spread(serving.finished - serving.arrived),
        busy_shares={name: busy / max(seconds, 1e-12) for name, busy in serving.busy_seconds.items()},
        falls_behind=_falls_behind(serving),
    )


def _falls_behind(serving: Serving) -> bool:
    first, last, end = float(serving.arrived[0]), float(serving.arrived[-1]), float(serving.finished.max())
    longest = float((serving.finished - serving.admitted).max())
    return end - last > 2 * longest and 0 < 1.1 * (last - first) < end - first


def spread(values: Seconds) -> Spread:
    """Return mean, percentiles by nearest rank, and maximum."""
    p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99), method="inverted_cdf"))
    return Spread(float(values.mean()), p50, p90, p99, float(values.max()))
