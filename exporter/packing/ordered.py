"""Tasks on several threads, their results in the order of the tasks, and few of them waiting."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_order(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], Result]], *, ahead: int) -> Iterator[Result]:
    """Yield the result of every task; at most `ahead` more are under way or wait, and an error ends them all.

    >>> with ThreadPoolExecutor(2) as pool:
    ...     list(in_order(pool, [lambda: 1, lambda: 2], ahead=1))
    [1, 2]
    """
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
