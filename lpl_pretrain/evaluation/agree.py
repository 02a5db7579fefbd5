"""Raises an error of one rank on all ranks, so that no rank waits for one that has stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.runtime.dist import first_error

Result = TypeVar("Result")


def run_and_agree(action: Callable[[], Result], *, act: bool = True) -> Result | None:
    """Collective.  Runs `action` where `act`; returns its result there, None on other ranks.

    A CheckpointError of one rank is raised on all ranks.
    """
    result = None
    problem = None
    try:
        result = action() if act else None
    except CheckpointError as error:
        problem = str(error)
    if (problem := first_error(problem)) is not None:
        raise CheckpointError(problem)
    return result
