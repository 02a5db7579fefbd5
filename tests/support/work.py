"""Amount of work of a call in units that do not depend on the machine or its load."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass(frozen=True)
class Work:
    calls: int
    """Python and C functions called in this thread."""
    peak_bytes: int
    """Most memory allocated at once, arrays included."""


def count_work(function: Callable[[], Any]) -> Work:
    """Run `function` and count its work."""
    calls = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return Work(calls, peak_bytes)
