"""From a YAML file, its `base:` chain and `key=value` overrides to a frozen, fully resolved configuration.

A file may name another one as its `base:` (path relative to itself) and say only what differs: mappings merge, unless their
`kind` differs; anything else replaces.  A section set to null is switched off.  Overrides come last: `optimizer.lr=3e-4 lpl=null`.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.section import Section
from lpl_pretrain.errors import ConfigError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
AnyConfig = TypeVar("AnyConfig", bound=Section)


def resolve_path(text: str) -> Path:
    """`asset:NAME` ships with this package, `package:NAME/PATH` with another one that is installed; the rest are paths."""
    if text.startswith("package:"):
        package, _, inner = text.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package)  # nothing of it is run
        if found is None or found.origin is None or not (Path(found.origin).parent / inner).exists():
            raise ConfigError(f"{text}: no such package, or nothing of that name in it; install it, or name a path")
        return Path(found.origin).parent / inner
    if not text.startswith("asset:"):
        return Path(text).expanduser()
    path = ASSETS / text.removeprefix("asset:")
    if not path.exists():
        shipped = ", ".join(f"asset:{p.name}" for p in sorted(ASSETS.iterdir()))
        raise ConfigError(f"{text}: no such asset; the package ships {shipped}")
    return path


def load_config(cls: type[AnyConfig], path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Raises ConfigError that lists every wrong key or value at once."""
    raw = _read_with_base(Path(path), seen=())
    for override in overrides:
        _apply_override(raw, override)
    return validate(cls, raw, where=str(path))


def load_run_config(run_dir: RunDir) -> TrainConfig:
    """The resolved configuration that a run was started with."""
    if not run_dir.config.is_file():
        raise ConfigError(
            f"{run_dir.config}: not found; {run_dir.path} is not a run directory: start one with `lpl-pretrain train`"
        )
    return load_config(TrainConfig, run_dir.config)


def validate(cls: type[AnyConfig], raw: dict[str, Any], where: str) -> AnyConfig:
    try:
        return cls.model_validate(raw)
    except ValidationError as problems:
        lines = [_explain(cls, problem) for problem in problems.errors(include_url=False)]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None


def dump(config: Section) -> str:
    """YAML that loads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(stored: Section, wanted: Section) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ: key -> (stored, wanted)."""
    old, new = flatten(stored.model_dump(mode="json")), flatten(wanted.model_dump(mode="json"))
    return {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)}


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise ConfigError(f"{path}: its `base:` chain comes back to itself: {' -> '.join(map(str, (*seen, path)))}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as problem:
        raise ConfigError(f"{path}: not valid YAML: {problem}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, wanted a mapping of keys to values")
    base = raw.pop("base", None)
    if base is None:
        return raw
    return _merge(_read_with_base((path.parent / base), (*seen, path)), raw)


def _merge(base: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in delta.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            value = _merge(old, value)
        merged[key] = value
    return merged


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r}: an override is key=value, such as optimizer.lr=3e-4")
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        if not isinstance(section.get(parent), dict):
            section[parent] = {}
        section = section[parent]
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        section[last] = text


def _explain(cls: type[BaseModel], problem: Any) -> str:
    location, cls_of_last = _walk(cls, [str(part) for part in problem["loc"]])
    path = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = list(cls_of_last.model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if problem["type"] == "union_tag_invalid":
        return f"{path}.kind={problem['ctx']['tag']!r}: wanted one of {problem['ctx']['expected_tags']}"
    if problem["type"] == "missing":
        return f"{path}: missing, and it has no default"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] != "value_error":
        return f"{path}={problem['input']!r}: {message}"
    return f"{path}: {message}" if path else message


def _walk(cls: type[BaseModel], location: list[str]) -> tuple[list[str], type[BaseModel]]:
    """The keys of a location, without pydantic's names for the members of a union, and the section that the last one is in."""
    keys: list[str] = []
    members: dict[str, type[BaseModel]] = {}
    for number, part in enumerate(location):
        if part in members:  # not a key: it says which member was tried
            cls, members = members[part], {}
            continue
        field = cls.model_fields.get(part)
        if field is None:
            return keys + location[number:], cls
        keys.append(part)
        found = [option for option in _options(field.annotation) if isinstance(option, type) and issubclass(option, BaseModel)]
        if found and number + 1 < len(location):
            cls = found[0]
            members = {str(option.model_fields["kind"].default): option for option in found if "kind" in option.model_fields}
    return keys, cls


def _options(annotation: Any) -> Iterator[Any]:
    """The members of a union, however deep they are annotated; a plain type is its own."""
    inner = get_args(annotation)
    yield annotation
    for option in inner:
        yield from _options(option)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, child in value.items():
        flat |= flatten(child, f"{prefix}.{name}" if prefix else name)
    return flat
