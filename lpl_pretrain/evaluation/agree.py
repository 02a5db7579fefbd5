"""Errors of one rank, raised on all of them, so that none waits for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.runtime.dist import first_error

Result = TypeVar("Result")


def run_and_agree(action: Callable[[], Result], *, act: bool = True) -> Result | None:
    """Collective. The result of `action` on the ranks that `act`; the CheckpointError of one is
    raised on all ranks.
    """
    result, problem = None, None
    try:
        result = action() if act else None
    except CheckpointError as error:
        problem = str(error)
    if (problem := first_error(problem)) is not None:
        raise CheckpointError(problem)
    return result
