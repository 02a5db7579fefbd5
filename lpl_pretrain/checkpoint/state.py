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


def _optional_names(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


SECTIONS: dict[str, dict[str, tuple[Check, str]]] = {
    "stream": {
        "samples_seen": (is_count, "an integer from 0"),
        "epoch": (is_count, "an integer from 0"),
        "seed": (is_count, "an integer from 0"),
        "fingerprint": (lambda value: isinstance(value, str), "text"),
        "contents": (_is_digests, "digests by name"),
    },
    "loss_scale": {
        "value": (lambda value: is_number(value) and value > 0, "a number above 0"),
        "dynamic": (lambda value: isinstance(value, bool), "true or false"),
        "good_updates": (is_count, "an integer from 0"),
    },
    "spikes": {
        "events": (is_count, "an integer from 0"),
        "terms": (_optional_names, "names of loss terms or null"),
        "window": (_is_window, "rows of numbers"),
    },
}
TERMS: dict[str, dict[str, tuple[Check, str]]] = {
    "lpl": {
        "frozen": (_optional_number, "a number or null"),
        "diffusion_sum": (is_number, "a number"),
        "perceptual_sum": (is_number, "a number"),
    },
}
"""Values of `loss_terms.NAME` that are checked."""
NULLABLE = ("spikes",)
COUNTS = ("step", "skipped_updates", "jump_updates")
LATER_KEYS = frozenset({"contents", "jump_updates", "spikes"})
"""Keys that checkpoints of earlier versions lack."""
TRAINER_KEYS = frozenset({*COUNTS, *SECTIONS, "loss_terms"}) - LATER_KEYS
"""Keys that a training run needs to resume."""


def read_state(folder: Path) -> dict[str, Any]:
    """Reads the state that was passed to `save`.  Raises DamagedCheckpointError."""
    try:
        state = read_json(regular_file(folder / STATE))
    except JSONError as error:
        raise DamagedCheckpointError(str(error)) from None
    if not isinstance(state, dict):
        raise DamagedCheckpointError(f"{folder / STATE}: found {shown(state)}, wanted an object")
    return upgraded(state)


def upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """The state in the present layout.  Until version 2 LPL was the only loss term with a state:
    `lpl_weight`, and `spikes.with_lpl`.

    The window of a run that looks for spikes starts anew, for it does not name its terms.
    """
    state = dict(state)
    if "lpl_weight" in state:
        weight = state.pop("lpl_weight")
        state["loss_terms"] = {} if weight is None else {"lpl": weight}
    spikes = state.get("spikes")
    if isinstance(spikes, dict) and "with_lpl" in spikes:
        state["spikes"] = {key: spikes[key] for key in spikes if key != "with_lpl"}
        state["spikes"]["terms"] = None
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
    terms = state.get("loss_terms", {})
    if not isinstance(terms, dict):
        return f"loss_terms: found {shown(terms)}, wanted an object"
    named = [(name, state.get(name), checks, name in state) for name, checks in SECTIONS.items()]
    for name, checks in TERMS.items():
        named.append((f"loss_terms.{name}", terms.get(name), checks, name in terms))
    for section, values, checks, present in named:
        if not present or (section in NULLABLE and values is None):
            continue
        if (problem := _section_problem(section, values, checks)) is not None:
            return problem
    return _disagreement(state, manifest)


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


def _section_problem(section: str, values: Any, checks: dict[str, tuple[Check, str]]) -> str | None:
    """Describe the first value of a section that no trainer writes; None: all are sound."""
    optional = LATER_KEYS - values.keys() if isinstance(values, dict) else LATER_KEYS
    needed = checks.keys() - optional
    if (problem := key_problem(values, frozenset(needed))) is not None:
        return f"{section}: {problem}"
    for key in sorted(needed):
        check, wanted = checks[key]
        if not check(values[key]):
            return f"{section}.{key}: found {shown(values[key])}, wanted {wanted}"
    return None
