"""When requests arrive: all at once, evenly, or by chance (a Poisson process), reproducibly for a seed."""

import math
import random
from typing import Literal

from plans.requests import Request

Process = Literal["poisson", "uniform"]


def make_requests(
    count: int, *, rate: float | None, process: Process, prompt_tokens: int, new_tokens: int, seed: int
) -> tuple[Request, ...]:
    """Return `count` requests of one length.

    Args:
        rate: requests per second; None lets all arrive at once.
        process: `poisson` draws independent exponential gaps, `uniform` spaces them evenly.
        prompt_tokens, new_tokens: of every request.
        seed: of the gaps.
    """
    rng = random.Random(seed)
    now, requests = 0.0, []
    for _ in range(count):
        requests.append(Request(arrival_seconds=now, prompt_tokens=prompt_tokens, new_tokens=new_tokens))
        if rate is not None:
            now += -math.log(1.0 - rng.random()) / rate if process == "poisson" else 1.0 / rate
    return tuple(requests)
