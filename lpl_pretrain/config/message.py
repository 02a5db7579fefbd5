"""Text of error messages: one line a problem, bounded in number and length, with everything
unprintable escaped.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

MAX_PROBLEMS = 20
MAX_VALUE = 80
MAX_LINE = 400
MAX_MESSAGE = 7000

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = MAX_VALUE
_repr.maxlevel = 4
_repr.maxdict = _repr.maxlist = _repr.maxtuple = 8


def short(value: object) -> str:
    """`repr` of a value in at most MAX_VALUE characters."""
    try:
        text = _repr.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} too long to print"
    return shorten(text, MAX_VALUE)


def shorten(text: str, limit: int) -> str:
    """`text`, or its beginning and end."""
    if len(text) <= limit:
        return text
    end = (limit - 3) // 3
    return f"{text[: limit - 3 - end]}...{text[-end:]}"


def one_line(text: str, limit: int = MAX_LINE) -> str:
    """`text` on one line: characters that do not print, line ends among them, are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shorten(text, limit))


def listed(where: str, problems: Sequence[str]) -> str:
    """One line a problem, `where` before each; the first MAX_PROBLEMS of them, and how many more
    there are.
    """
    prefix = f"{one_line(where, 200)}: " if where else ""
    lines: list[str] = []
    length = 0
    for problem in problems[:MAX_PROBLEMS]:
        line = prefix + one_line(problem)
        length += len(line) + 1
        if length > MAX_MESSAGE:
            break
        lines.append(line)
    if left := len(problems) - len(lines):
        lines.append(f"{prefix}and {left} more problem{'s' if left > 1 else ''}")
    return "\n".join(lines)
