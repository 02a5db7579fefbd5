"""Reads a JSON file strictly: regular, small, UTF-8, finite numbers, no key twice."""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl_pretrain.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_PROBLEMS = 20
MAX_DIGITS = 40
"""Longer integers are read as floats; no key takes one."""
BOMS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Problem:
    """Problem at one key of the file."""

    path: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{key_path(self.path)}: {self.text}" if self.path else self.text


def read_json(path: str | Path, name: str, *, drop_bom: bool = False) -> tuple[Any, list[Problem]]:
    """The content, and its repeated keys (the last value is kept) and numbers that are not finite.

    `name`: how error messages call the file.  Raises ConfigError for what cannot be read at all.
    """
    text = _decode(_read_bytes(path, name), name, drop_bom)
    try:
        raw = json.loads(text, object_pairs_hook=_Object, parse_int=_integer)
    except RecursionError:
        raise _too_deep(name) from None
    except ValueError as error:
        raise ConfigError(f"{name}: not JSON: {error}") from error
    return _plain(raw, name)


def key_path(path: tuple[str, ...]) -> str:
    """Dotted; keys with other characters than those of a word are quoted."""
    return ".".join(
        part if part.replace("_", "").isalnum() and part.isascii() else show(part) for part in path
    )


def show(value: Any) -> str:
    """A short repr of a value of any size and depth."""
    short = reprlib.Repr()
    short.maxstring, short.maxother, short.maxlong, short.maxlevel = 60, 60, 60, 2
    return short.repr(value)


def refuse(name: str, problems: list[Problem], what: str) -> None:
    """Raises ConfigError when there are problems; names at most MAX_PROBLEMS of them."""
    if not problems:
        return
    lines = [str(problem) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"and {len(problems) - MAX_PROBLEMS} more")
    keys = "1 key" if len(problems) == 1 else f"{len(problems)} keys"
    raise ConfigError(f"{name}: {keys} {what}:\n  " + "\n  ".join(lines))


class _Object(dict):
    """A JSON object that remembers which of its keys came twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = {
            key for key, count in Counter(key for key, _ in pairs).items() if count > 1
        }


def _read_bytes(path: str | Path, name: str) -> bytes:
    wanted = "wanted a DeepSpeed JSON file, such as configs/zero/zero2.json"
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
            raise ConfigError(f"{name}: is {kind}; {wanted}")
        with open(path, "rb") as file:
            found = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}; {wanted}") from error
    except ValueError as error:  # a NUL or a lone surrogate in the path
        raise ConfigError(f"{name}: {error}; {wanted}") from error
    if len(found) > MAX_BYTES:
        raise ConfigError(f"{name}: has more than {MAX_BYTES} bytes; {wanted}")
    return found


def _decode(found: bytes, name: str, drop_bom: bool) -> str:
    if drop_bom:
        found = found.removeprefix(BOMS[0])
    if found.startswith(BOMS):
        raise ConfigError(f"{name}: begins with a byte order mark: save it as UTF-8 without one")
    if b"\0" in found:
        raise ConfigError(
            f"{name}: holds a NUL byte at position {found.index(0)}: not a JSON file in UTF-8"
        )
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name}: not UTF-8: byte 0x{found[error.start]:02x} at position {error.start}"
        ) from None


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _too_deep(name: str) -> ConfigError:
    return ConfigError(f"{name}: is nested more than {MAX_DEPTH} levels deep; no DeepSpeed JSON is")


def _plain(raw: Any, name: str) -> tuple[Any, list[Problem]]:
    """Plain dicts and lists, and the problems in them."""
    problems: list[Problem] = []

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        if len(path) > MAX_DEPTH:
            raise _too_deep(name)
        if isinstance(value, _Object):
            problems.extend(
                Problem((*path, key), "is there twice; keep one of the two")
                for key in value
                if key in value.repeated
            )
            return {key: walk(child, (*path, key)) for key, child in value.items()}
        if isinstance(value, list):
            return [walk(child, (*path, str(number))) for number, child in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(Problem(path, f"found {value}, wanted a finite number"))
        return value

    return walk(raw, ()), problems
