"""Names of the folders and files that belong to one step."""

from __future__ import annotations

import re

STEP_NAME = re.compile(r"step_([0-9]{8,})")


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step whose `step_name` this is; None for any other name, such as one with more zeros."""
    found = STEP_NAME.fullmatch(name)
    step = int(found[1]) if found else None
    return step if step is not None and step_name(step) == name else None
