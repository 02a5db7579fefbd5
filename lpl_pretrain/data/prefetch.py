"""A prefetching, order-preserving `map` on threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, buffer_size: int
) -> Generator[Result, None, None]:
    """Yields `function(item)` in the order of `items`, computed on `threads` threads up to
    `buffer_size` items ahead of the consumer.

    `items` is consumed on the caller's thread.  An error of `function` is raised where its result
    would have been yielded.  Closing the iterator joins the threads.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > buffer_size:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
