"""JSON that means one thing: no repeated keys, no NaN or infinity, UTF-8 only; and one canonical text of a value."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

MAX_DIGITS = 40


def strict_loads(raw: bytes) -> Any:
    """Raises ValueError, with the reason, for everything else that Python's parser accepts or fails on."""
    try:
        text = raw.decode()
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
        if "\\ud" in text.lower():  # the only way to half of a surrogate pair, which no file or log can hold
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as problem:
        raise ValueError(f"not UTF-8 at byte {problem.start}") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair") from None


def canonical_sha256(value: Any) -> str:
    """sha256 over the canonical text of a JSON value: sorted keys, no spaces, ASCII.

    Raises ValueError for NaN and infinity.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {repeated[:80]!r} is there twice")
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _bounded(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits is out of range")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is out of range")
    return value
