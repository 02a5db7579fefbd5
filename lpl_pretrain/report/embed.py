"""What a page may hold of a run's files: pictures and text that lie inside the run, of bounded
size.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

MIB = 2**20
MOST_PICTURE_BYTES, MOST_TEXT_BYTES, MOST_CONFIG_BYTES = 64 * MIB, 64 * MIB, MIB
MIME_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
"""By the first bytes of a file."""
LONGEST_NAME = 200


def picture(run: Path, folder: str, name: Any, source: str, problems: list[str]) -> str | None:
    """Return a data URI of the picture `name` (relative to the run) in the run's `folder`.

    None when there is no such file, and when it may not be shown: `problems` then says why.
    `source`: what names the picture.
    """
    path = find_picture(run, folder, name, source, problems)
    if path is None:
        return None
    content = path.read_bytes()
    for start, mime_type in MIME_TYPES.items():
        if content.startswith(start):
            return f"data:{mime_type};base64,{base64.b64encode(content).decode()}"
    _note(problems, source, name, "neither a PNG nor a JPEG")
    return None


def find_picture(
    run: Path, folder: str, name: Any, source: str, problems: list[str]
) -> Path | None:
    """The file that `picture` would show, as far as that is known without reading it."""
    if not name:
        return None
    problem = "wanted the name of a file"
    if isinstance(name, str):
        try:
            path = inside(run, run / name, folder)
            if path is not None and not path.is_file():
                return None
            if path is not None and path.stat().st_size <= MOST_PICTURE_BYTES:
                return path
            problem = (
                f"larger than {MOST_PICTURE_BYTES // MIB} MiB"
                if path
                else f"lies outside of the run's {folder}/"
            )
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({error})"
    _note(problems, source, name, problem)
    return None


def _note(problems: list[str], source: str, name: Any, problem: str) -> None:
    text = (
        f"{source}: picture {brief(repr(name), LONGEST_NAME)}: {brief(problem, LONGEST_NAME)}; "
        "not shown"
    )
    if text not in problems:
        problems.append(text)


def inside(run: Path, path: Path, folder: str = "") -> Path | None:
    """`path` without symbolic links; None when it lies outside of `folder` in the run.  Raises
    OSError or ValueError.
    """
    try:
        found = path.resolve()
        return found if found.is_relative_to(run.resolve() / folder) else None
    except RuntimeError as problem:  # links that lead in a circle
        raise OSError(str(problem)) from None


def read_text(run: Path, path: Path, problems: list[str], most: int = MOST_TEXT_BYTES) -> str:
    """The text of a file of the run; "" where there is none, or where `problems` says why it is not
    read.
    """
    where = path.relative_to(run)
    try:
        found = inside(run, path)
        if found is None:
            problems.append(f"{where}: is a link to a file outside of the run; not shown")
            return ""
        if not found.is_file():
            return ""
        if found.stat().st_size > most:
            problems.append(f"{where}: larger than {most // MIB} MiB; not shown")
            return ""
        return found.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError) as problem:
        problems.append(f"{where}: cannot be read ({problem})")
        return ""


def brief(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def clean(text: str) -> str:
    """`text` without what cannot be written: bytes of a file's name that are not UTF-8."""
    return text.encode("utf-8", "replace").decode()
