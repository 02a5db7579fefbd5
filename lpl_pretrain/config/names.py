"""Rules for names and paths from any source: text that a file system, a script and a log can hold
unchanged.
"""

from __future__ import annotations

import unicodedata

MAX_NAME_BYTES = 200
"""File names that are derived from a name, such as best_<name>.json, stay below the 255 bytes that
file systems allow.
"""
MAX_COMPONENT_BYTES = 255
MAX_PATH_BYTES = 4000
CONTROL_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories: control characters, surrogates, line and paragraph separators."""


def is_url(path: object) -> bool:
    """Something that fsspec opens (s3://, gs://, https://, memory:// ...), rather than a path of
    this machine.
    """
    return "://" in str(path)


def control_character(text: str, allowed: str = "") -> str | None:
    """First control character, line separator or lone surrogate (an undecodable byte) in `text`."""
    for character in text:
        if unicodedata.category(character) in CONTROL_CATEGORIES and character not in allowed:
            return character
    return None


def unusable_character(text: str) -> str | None:
    """Says which control character, line separator or lone surrogate is in `text`, if any."""
    character = control_character(text)
    if character is None:
        return None
    if unicodedata.category(character) == "Cs":
        return f"has {character!r}, which is no character (the text was not UTF-8)"
    return f"has the control character {character!r}"


def name_problem(text: str) -> str | None:
    """Reason why `text` cannot be the name of one file; None: it can."""
    if problem := unusable_character(text):
        return f"{problem}; wanted printable characters"
    if not text or text in (".", ".."):
        return "is no name; wanted letters, digits, - and _"
    if "/" in text:
        return "holds a /; wanted a name, not a path"
    if text != text.strip():
        return "begins or ends with white space; remove it"
    if (size := len(text.encode())) > MAX_NAME_BYTES:
        return f"has {size} bytes; wanted a name of at most {MAX_NAME_BYTES}"
    return None


def path_problem(text: str) -> str | None:
    """Reason why `text` cannot be a path or URL; None: it can."""
    if problem := unusable_character(text):
        return f"{problem}; wanted printable characters"
    if not text:
        return "is empty; wanted a path"
    if (size := len(text.encode())) > MAX_PATH_BYTES:
        return f"has {size} bytes; wanted a path of at most {MAX_PATH_BYTES}"
    if (
        not is_url(text)
        and max(len(part.encode()) for part in text.split("/")) > MAX_COMPONENT_BYTES
    ):
        return (
            f"has a part of more than {MAX_COMPONENT_BYTES} bytes between slashes; wanted a "
            "shorter one"
        )
    return None
