"""Schema of state.json: the state of the trainer beside tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lpl_pretrain.checkpoint.manifest import STATE, Manifest, regular_file
from lpl_pretrain.config.strict_json import (
    JSONError,
    is_count,
    is_number,
    key_problem,
    read_json,
    shown,
)
from lpl_pretrain.errors import DamagedCheckpointError

Check = Callable[[Any], bool]


def _optional_number(value: Any) -> bool:
    return value is None or is_number(value)


def _is_digests(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())


def _is_window(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and all(map(_optional_number, row)) for row in value
    )


SECTIONS: dict[str, dict[str, tuple[Check, str]]] = {
    "stream": {
        "samples_seen": (is_count, "an integer from 0"),
        "epoch": (is_count, "an integer from 0"),
        "seed": (is_count, "an integer from 0"),
        "fingerprint": (lambda value: isinstance(value, str), "text"),
        "contents": (_is_digests, "digests by name"),
    },
    "lpl_weight": {
        "frozen": (_optional_number, "a number or null"),
        "diffusion_sum": (is_number, "a number"),
        "perceptual_sum": (is_number, "a number"),
    },
    "loss_scale": {
        "value": (lambda value: is_number(value) and value > 0, "a number above 0"),
        "dynamic": (lambda value: isinstance(value, bool), "true or false"),
        "good_updates": (is_count, "an integer from 0"),
    },
    "spikes": {
        "events": (is_count, "an integer from 0"),
        "with_lpl": (lambda value: value is None or isinstance(value, bool), "true, false or null"),
        "window": (_is_window, "rows of numbers"),
    },
}
NULLABLE = ("lpl_weight", "spikes")
COUNTS = ("step", "skipped_updates", "jump_updates")
LATER_KEYS = frozenset({"contents", "jump_updates", "spikes"})
"""Keys that checkpoints of earlier versions lack."""
TRAINER_KEYS = frozenset({*COUNTS, *SECTIONS}) - LATER_KEYS
"""Keys that a training run needs to resume."""


def read_state(folder: Path) -> dict[str, Any]:
    """Reads the state that was passed to `save`.  Raises DamagedCheckpointError."""
    try:
        state = read_json(regular_file(folder / STATE))
    except JSONError as error:
        raise DamagedCheckpointError(str(error)) from None
    if not isinstance(state, dict):
        raise DamagedCheckpointError(f"{folder / STATE}: found {shown(state)}, wanted an object")
    return state


def check_state(folder: Path, state: dict[str, Any], manifest: Manifest, *, complete: bool) -> None:
    """Raises DamagedCheckpointError for values that no trainer writes.

    With `complete`, every key that a training run needs must be present.
    """
    problem = _problem(state, manifest)
    if problem is None and complete and (missing := sorted(TRAINER_KEYS - state.keys())):
        problem = f"has no {', '.join(missing)}"
    if problem is not None:
        raise DamagedCheckpointError(f"{folder / STATE}: {problem}")


def _problem(state: dict[str, Any], manifest: Manifest) -> str | None:
    """Describes the first invalid value, if any."""
    for key in COUNTS:
        if key in state and not is_count(state[key]):
            return f"{key}: found {shown(state[key])}, wanted an integer from 0"
    for section in SECTIONS:
        values = state.get(section)
        if section not in state or (section in NULLABLE and values is None):
            continue
        if (problem := _section_problem(section, values)) is not None:
            return problem
    return _disagreement(state, manifest)


def _section_problem(section: str, values: Any) -> str | None:
    checks = SECTIONS[section]
    absent = LATER_KEYS - values.keys() if isinstance(values, dict) else LATER_KEYS
    needed = checks.keys() - absent
    if (problem := key_problem(values, frozenset(needed))) is not None:
        return f"{section}: {problem}"
    for key in sorted(needed):
        check, wanted = checks[key]
        if not check(values[key]):
            return f"{section}.{key}: found {shown(values[key])}, wanted {wanted}"
    return None


def _disagreement(state: dict[str, Any], manifest: Manifest) -> str | None:
    """Describes a value that contradicts the manifest, if any."""
    if state.get("step", manifest.step) != manifest.step:
        return f"step: found {state['step']}, the manifest says {manifest.step}"
    skipped = state.get("skipped_updates", 0)
    updates = manifest.optimizer_steps
    if updates + skipped > manifest.step:
        return (
            f"skipped_updates: found {skipped} beside {updates} updates, wanted {manifest.step} "
            "steps at most"
        )
    samples_seen = state.get("stream", {}).get("samples_seen", manifest.samples_seen)
    if samples_seen != manifest.samples_seen:
        return (
            f"stream.samples_seen: found {samples_seen}, the manifest says {manifest.samples_seen}"
        )
    return None
