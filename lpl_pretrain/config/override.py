"""Overrides `key=value` whose value is a given text, exactly."""

from __future__ import annotations

import json


def as_override(key: str, value: str) -> str:
    """Return an override that sets `key` to the text `value`, whatever is in it.

    The value is a double-quoted scalar that JSON and YAML read alike: what is not printable is
    escaped, for YAML folds U+0085, U+2028 and U+2029 into a space and refuses other characters.
    Characters beyond U+FFFF stay as they are: JSON would write a pair of escapes, which YAML does
    not join.
    """
    written = "".join(
        c if c.isprintable() or ord(c) > 0xFFFF else _escaped(c) for c in _quoted(value)
    )
    return f'{key}="{written}"'


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]
