"""Hypothesis settings of tests/fuzz: few fixed cases in CI, many random ones in a long run.

LPL_FUZZ_SCALE=50 python -m pytest tests/fuzz    # 50 times as many cases, with fresh random seeds
"""

from __future__ import annotations

import os
from collections.abc import Callable

from hypothesis import HealthCheck, settings

SCALE = int(os.environ.get("LPL_FUZZ_SCALE", "1"))
registered: dict[tuple[str, str], int] = {}
"""(module, test) -> cases of each test that `cases` decorates, before scaling."""


def cases(count: int) -> Callable[[Callable], Callable]:
    """Decorate a property test: it runs `count` cases, the same every time unless LPL_FUZZ_SCALE is
    above 1.
    """
    configured = settings(
        max_examples=count * SCALE,
        deadline=None,
        derandomize=SCALE == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def decorate(test: Callable) -> Callable:
        registered[test.__module__.rpartition(".")[2], test.__qualname__] = count
        return configured(test)

    return decorate
