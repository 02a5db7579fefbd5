"""Adapts a DeepSpeed JSON that was written for another trainer: keeps the engine's tuning."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl_pretrain.config.zero.check import (
    AUTO,
    BUILTIN,
    find_problems,
    normalised,
    read_zero_config,
    stage_of,
    suggestion,
    value_problem,
)
from lpl_pretrain.config.zero.json_file import Problem, key_path, read_json, refuse, show
from lpl_pretrain.config.zero.keys import NULLABLE, OWNED, TUNING, Key, Keys, is_number
from lpl_pretrain.config.zero.translate import translate
from lpl_pretrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Change:
    """One key that was taken out or changed."""

    path: tuple[str, ...]
    value: Any
    text: str

    def __str__(self) -> str:
        return f"{key_path(self.path)} = {show(self.value)}: {self.text}"


@dataclass(frozen=True, slots=True)
class Adapted:
    settings: dict[str, Any]
    """Settings that `read_zero_config` accepts."""
    changes: list[Change]

    @property
    def stage(self) -> int:
        return self.settings["zero_optimization"]["stage"]

    @property
    def is_builtin(self) -> bool:
        """Whether the strategy of that stage says the same without a file."""
        path = BUILTIN / f"zero{self.stage}.json"
        return path.is_file() and read_zero_config(path) == self.settings

    def dump(self) -> str:
        return json.dumps(self.settings, indent=2) + "\n"


def adapt_file(path: str | Path) -> Adapted:
    """Raises ConfigError for what is no JSON object, or whose ZeRO stage cannot be known."""
    content, structural = read_json(path, str(path), drop_bom=True)
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: found a JSON {type(content).__name__}, wanted an object with "
            "zero_optimization"
        )
    changes = [
        Change(
            problem.path, _value_at(content, problem.path), "is there twice; the last one counts"
        )
        for problem in structural
        if "twice" in problem.text
    ]
    zero = _zero_section(content, changes)
    kept = _adapt({**content, "zero_optimization": zero}, TUNING, (), changes)
    if stage_of(kept["zero_optimization"]) is None:
        found = Problem(
            ("zero_optimization", "stage"), f"found {show(zero['stage'])}, wanted 0, 1, 2 or 3"
        )
        refuse(str(path), [found], "must be set by you")
    while problems := find_problems(kept):
        for problem in problems:
            value = _remove(kept, problem.path)
            changes.append(Change(problem.path, value, problem.text.removesuffix("; remove it")))
    return Adapted(normalised(kept, TUNING), changes)


def _zero_section(content: dict[str, Any], changes: list[Change]) -> dict[str, Any]:
    """`zero_optimization` with a stage, and with offload as DeepSpeed spells it today."""
    path, zero = ("zero_optimization",), content.get("zero_optimization")
    if zero is None or isinstance(zero, bool):
        stage = 1 if zero else 0
        changes.append(
            Change(
                path, zero, f'changed to {{"stage": {stage}}}, which is what DeepSpeed takes it for'
            )
        )
        return {"stage": stage}
    if not isinstance(zero, dict):
        return {"stage": zero}
    zero = dict(zero)
    if "stage" not in zero:
        zero["stage"] = 0
        changes.append(
            Change((*path, "stage"), None, "added as 0, DeepSpeed's default: nothing is sharded")
        )
    pinned = zero.pop("cpu_offload_use_pin_memory", None)
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if old not in zero:
            continue
        value, text = zero.pop(old), "is off by default"
        if value is True and not zero.get(new):
            zero[new] = {"device": "cpu"} | (
                {"pin_memory": pinned} if isinstance(pinned, bool) else {}
            )
            text = f"changed to {new}={json.dumps(zero[new])}"
        changes.append(Change((*path, old), value, text))
    return zero


def _adapt(
    content: dict[str, Any], table: Keys, path: tuple[str, ...], changes: list[Change]
) -> dict[str, Any]:
    """Repairs what has one meaning, takes out the rest."""
    kept: dict[str, Any] = {}
    for name, value in content.items():
        rule, here = table.get(name), (*path, name)
        if rule is None and not path and name in OWNED:
            changes.append(Change(here, value, translate(name, value)))
            continue
        if rule is None:
            close = suggestion(name, table)
            if close is None or close in content or close in kept:
                changes.append(Change(here, value, "DeepSpeed 0.19.8 has no such key"))
                continue
            changes.append(Change(here, value, f"renamed to {close}"))
            name, rule, here = close, table[close], (*path, close)
        if not isinstance(rule, Key):
            if isinstance(value, dict):
                kept[name] = _adapt(value, rule, here, changes)
            elif value is None and name in NULLABLE:
                kept[name] = None
            else:
                changes.append(Change(here, value, "wanted an object"))
            continue
        repaired = _repair(value, rule)
        if value_problem(repaired, rule) is None:
            kept[name] = repaired
            if repaired is not value:
                changes.append(Change(here, value, f"changed to {show(repaired)}"))
        else:
            problem = value_problem(value, rule) or ""
            changes.append(Change(here, value, problem.removesuffix("; remove it")))
    return kept


def _repair(value: Any, rule: Key) -> Any:
    """The value that a string stands for, and the host's memory for NVMe; otherwise the value
    itself.
    """
    if rule.refused or value == AUTO or value_problem(value, rule) is None:
        return value
    if value == "nvme":
        return "cpu"
    candidates: list[Any] = [bool(value)] if is_number(value) and value in (0, 1) else []
    if isinstance(value, str) and len(value) < 40:
        candidates.append({"true": True, "false": False}.get(value.strip().lower()))
        with suppress(ValueError):
            candidates.append(float(value))
    found = next(
        (one for one in candidates if one is not None and value_problem(one, rule) is None), value
    )
    return int(found) if rule.integer and isinstance(found, float) else found


def _remove(content: dict[str, Any], path: tuple[str, ...]) -> Any:
    for part in path[:-1]:
        content = content[part]
    return content.pop(path[-1])


def _value_at(content: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        content = content[int(part)] if isinstance(content, list) else content[part]
    return content
