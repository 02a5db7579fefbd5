"""Reads images and text of a run for a page: only files inside the run, of bounded size."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

MIB = 2**20
MAX_IMAGE_BYTES = 64 * MIB
MAX_TEXT_BYTES = 64 * MIB
MAX_CONFIG_BYTES = MIB
MIME_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
"""First bytes of a file -> its type."""
MAX_NAME_LENGTH = 200


def embed_image(run: Path, folder: str, name: Any, source: str, problems: list[str]) -> str | None:
    """Data URI of the image `name` (relative to the run), which must be in the run's `folder`.

    None when there is no such file, and when it may not be shown: the reason is then appended to
    `problems`.  `source`: the file that names the image.
    """
    path = find_image(run, folder, name, source, problems)
    if path is None:
        return None
    content = path.read_bytes()
    for start, mime_type in MIME_TYPES.items():
        if content.startswith(start):
            return f"data:{mime_type};base64,{base64.b64encode(content).decode()}"
    _note(problems, source, name, "neither a PNG nor a JPEG")
    return None


def find_image(run: Path, folder: str, name: Any, source: str, problems: list[str]) -> Path | None:
    """File that `embed_image` would show, as far as that is known without reading it."""
    if not name:
        return None
    problem = "wanted the name of a file"
    if isinstance(name, str):
        try:
            path = inside(run, run / name, folder)
            if path is not None and not path.is_file():
                return None
            if path is not None and path.stat().st_size <= MAX_IMAGE_BYTES:
                return path
            problem = (
                f"larger than {MAX_IMAGE_BYTES // MIB} MiB"
                if path
                else f"is outside of the run's {folder}/"
            )
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({error})"
    _note(problems, source, name, problem)
    return None


def _note(problems: list[str], source: str, name: Any, problem: str) -> None:
    text = (
        f"{source}: image {brief(repr(name), MAX_NAME_LENGTH)}: {brief(problem, MAX_NAME_LENGTH)}; "
        "not shown"
    )
    if text not in problems:
        problems.append(text)


def inside(run: Path, path: Path, folder: str = "") -> Path | None:
    """Resolve symbolic links; None when `path` is then outside of `folder` in the run.

    Raises OSError or ValueError.
    """
    try:
        resolved = path.resolve()
        return resolved if resolved.is_relative_to(run.resolve() / folder) else None
    except RuntimeError as error:  # a loop of links
        raise OSError(str(error)) from None


def read_text(run: Path, path: Path, problems: list[str], most: int = MAX_TEXT_BYTES) -> str:
    """Text of a file of the run; "" where it is absent, or where it may not be read.

    The reason is then appended to `problems`.
    """
    name = path.relative_to(run)
    try:
        resolved = inside(run, path)
        if resolved is None:
            problems.append(f"{name}: is a link to a file outside of the run; not shown")
            return ""
        if not resolved.is_file():
            return ""
        if resolved.stat().st_size > most:
            problems.append(f"{name}: larger than {most // MIB} MiB; not shown")
            return ""
        return resolved.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:
        problems.append(f"{name}: cannot be read ({error})")
        return ""


def brief(text: str, most: int) -> str:
    """Cut `text` after `most` characters, with an ellipsis."""
    return text if len(text) <= most else f"{text[:most]}…"


def clean(text: str) -> str:
    """Replace what UTF-8 cannot encode: bytes of a file name that are not UTF-8."""
    return text.encode("utf-8", "replace").decode()
