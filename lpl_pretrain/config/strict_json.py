"""Strict reading of JSON files: whatever `json.loads` would accept in silence is an error that
names the file.

Refused: repeated keys, NaN and infinity, integers of more than 40 digits, deep nesting, text that
is not UTF-8, empty files, files above a size, and everything that is no regular file (a directory,
a pipe).
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIMIT_BYTES = 64 << 20
MOST_DIGITS = 40

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel, _short.maxdict, _short.maxlist = 2, 3, 4


class JSONError(ValueError):
    """A file that does not hold the JSON that was wanted; the message begins with its path."""


def read_json(path: Path, *, limit_bytes: int = LIMIT_BYTES) -> Any:
    """Raises JSONError, for a file that is not there too."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
            raise JSONError(f"{path}: is {kind}, wanted a regular file")
        if found.st_size > limit_bytes:
            raise JSONError(f"{path}: has {found.st_size} bytes, wanted at most {limit_bytes}")
        data = path.read_bytes()
    except OSError as error:
        raise JSONError(f"{path}: {error.strerror or error}") from None
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> Any:
    """Raises JSONError whose message begins with `where`."""
    if not data.strip():
        raise JSONError(f"{where}: is empty, wanted JSON")
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
        if (
            "\\ud" in text.lower()
        ):  # the only way to half of a surrogate pair, which no file or log can hold
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        raise JSONError(f"{where}: is not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise JSONError(f"{where}: holds half of a surrogate pair") from None
    except RecursionError:
        raise JSONError(f"{where}: is nested too deeply") from None
    except ValueError as error:
        raise JSONError(f"{where}: is not valid JSON: {error}") from None


def canonical_sha256(value: Any) -> str:
    """sha256 over the canonical text of a JSON value: sorted keys, no spaces, ASCII.

    Raises ValueError for NaN and infinity.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def shown(value: object) -> str:
    """A short form of `value` for messages; control characters are escaped."""
    return _short.repr(value)


def key_problem(content: Any, wanted: Mapping[str, object] | frozenset[str]) -> str | None:
    """Problem with the keys of an object that should have exactly `wanted`, if any."""
    if not isinstance(content, dict):
        return f"found {shown(content)}, wanted an object"
    if missing := sorted(
        wanted - content.keys() if isinstance(wanted, frozenset) else wanted.keys() - content.keys()
    ):
        return f"has no {', '.join(missing)}"
    if unknown := sorted(content.keys() - set(wanted)):
        return f"has unknown keys: {', '.join(map(shown, unknown[:3]))}"
    return None


def is_count(value: object) -> bool:
    """True for an integer from 0 to 2^63 - 1; a bool is none."""
    return type(value) is int and 0 <= value < 1 << 63


def is_number(value: object) -> bool:
    """True for a finite int or float; a bool is none."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"the key {shown(next(key for key in keys if keys.count(key) > 1))} is there twice"
        )
    return content


def _refuse_constant(text: str) -> float:
    raise ValueError(f"holds {text}, which is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:30]} is too large")
    return value


def _bounded(text: str) -> int:
    if len(text.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits, wanted at most {MOST_DIGITS}")
    return int(text)
