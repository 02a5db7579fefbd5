"""Loading of configurations: from a YAML file, its `base:` chain and `key=value` overrides to a
frozen, fully resolved configuration.

A file may name another one as its `base:` (path relative to itself) and say only what differs:
mappings merge, unless their `kind` differs; anything else replaces.  A section set to null is
switched off.  Overrides come last: `optimizer.lr=3e-4 lpl=null`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from lpl_pretrain.config.base import Section
from lpl_pretrain.config.message import listed, one_line, short
from lpl_pretrain.config.paths import ASSETS, expand, resolve_path
from lpl_pretrain.config.problems import problems_of
from lpl_pretrain.config.renamed_keys import is_stored_copy, with_new_keys
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.yaml_reader import MAX_DEPTH, read_mapping, read_value
from lpl_pretrain.errors import ConfigError

__all__ = [
    "ASSETS",
    "differences",
    "dump",
    "flatten",
    "load_config",
    "load_run_config",
    "resolve_path",
    "validate",
    "validate_stored",
]
MAX_BASES = 16
ALTERNATIVES = {
    "lpl": frozenset({"weight", "target_fraction"}),
    "lpl.gate": frozenset({"snr_above", "noise_level_below", "timestep_below"}),
    "init_from": frozenset({"run", "file", "diffusers"}),
}
"""Section -> keys of which exactly one is set.  One in a file over its base, or in an override,
replaces another in the base.
"""
AnyConfig = TypeVar("AnyConfig", bound=Section)


def load_config(cls: type[AnyConfig], path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Raises ConfigError that lists every wrong key or value at once, up to a limit."""
    file = expand(path)
    raw = _read_with_base(file, visited=())
    if is_stored_copy(file):
        raw = with_new_keys(cls.__name__, raw)
    given = {override.partition("=")[0] for override in overrides}
    for override in overrides:
        _apply_override(raw, override, given)
    return validate(cls, raw, where=str(path))


def load_run_config(run_dir: RunDir) -> TrainConfig:
    """The resolved configuration that a run was started with."""
    if not os.path.isfile(run_dir.config):
        raise ConfigError(
            f"{run_dir.config}: not found; {run_dir.path} is not a run directory: start one with "
            "`lpl-pretrain train`"
        )
    raw = _read_with_base(run_dir.config, visited=())
    return validate_stored(TrainConfig, raw, where=str(run_dir.config))


def validate(cls: type[AnyConfig], raw: dict[str, Any], where: str) -> AnyConfig:
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(listed(where, problems_of(cls, error))) from None


def validate_stored(cls: type[AnyConfig], raw: dict[str, Any], where: str) -> AnyConfig:
    """Validates settings that this package stored, perhaps under earlier names of keys."""
    return validate(cls, with_new_keys(cls.__name__, raw), where)


def dump(config: Section) -> str:
    """YAML that loads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(stored: Section, wanted: Section) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ: key -> (stored, wanted)."""
    old, new = flatten(stored.model_dump(mode="json")), flatten(wanted.model_dump(mode="json"))
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def _read_with_base(path: Path, visited: tuple[str, ...]) -> dict[str, Any]:
    real = os.path.realpath(path)
    if real in visited:
        chain = " -> ".join(one_line(name, 60) for name in (*visited, real))
        raise ConfigError(f"{one_line(str(path))}: its `base:` chain comes back to itself: {chain}")
    if len(visited) > MAX_BASES:
        raise ConfigError(
            f"{one_line(str(path))}: is the end of a chain of more than {MAX_BASES} `base:` files"
        )
    raw = read_mapping(path)
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{one_line(str(path))}: base={short(base)}: wanted the path of one file")
    try:
        other = path.parent / expand(base)
    except ConfigError as problem:
        raise ConfigError(f"{one_line(str(path))}: base: {problem}") from None
    return _merge(_read_with_base(other, (*visited, real)), raw)


def _merge(base: dict[str, Any], delta: dict[str, Any], section: str = "") -> dict[str, Any]:
    alternatives = ALTERNATIVES.get(section, frozenset())
    replaced = alternatives if alternatives & delta.keys() else frozenset()
    merged = {key: value for key, value in base.items() if key not in replaced}
    for key, value in delta.items():
        old = merged.get(key)
        if (
            isinstance(value, dict)
            and isinstance(old, dict)
            and value.get("kind", old.get("kind")) == old.get("kind")
        ):
            value = _merge(old, value, f"{section}.{key}" if section else key)
        merged[key] = value
    return merged


def _apply_override(raw: dict[str, Any], override: str, given: set[str]) -> None:
    """`given`: the keys of all overrides; two alternatives among them are left to the section's own
    check.
    """
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"{short(override)}: an override is key=value, such as optimizer.lr=3e-4")
    if len(parts) > MAX_DEPTH:
        raise ConfigError(
            f"{short(override)}: its key has {len(parts)} parts, wanted at most {MAX_DEPTH}"
        )
    section = raw
    for number, part in enumerate(parts[:-1]):
        inner = section.get(part)
        if inner is None:
            section[part] = inner = {}
        if not isinstance(inner, dict):
            parent = one_line(".".join(parts[: number + 1]), 80)
            raise ConfigError(
                f"{short(override)}: {parent}={short(inner)} is a value and no section; set "
                f"{parent} itself"
            )
        section = inner
    try:
        section[parts[-1]] = read_value(text)
    except ConfigError as error:
        raise ConfigError(f"{short(override)}: its {error}; put quotes around a text") from None
    where = ".".join(parts[:-1])
    alternatives = ALTERNATIVES.get(where, frozenset())
    for other in alternatives if parts[-1] in alternatives else ():
        if f"{where}.{other}" not in given:
            section.pop(other, None)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, child in value.items():
        flat |= flatten(child, f"{prefix}.{name}" if prefix else name)
    return flat
