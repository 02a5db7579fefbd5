"""Pictures out of a WebDataset tar: members joined to samples, whatever is damaged told in its
place.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lpl_pretrain.data.tar import BLOCK, split_member_name
from lpl_pretrain.encoding.pictures import PICTURE_EXTENSIONS, Picture, Problem
from lpl_pretrain.errors import DataError

MAX_HEADER_BYTES = 1 << 20
MAX_TEXT_BYTES = {"cls": 64, "txt": 1 << 20, "json": 16 << 20}
"""Of members that are read whole while a tar is listed."""
MAX_CLASS_NAME = 1000
_CLASS_ID = re.compile(rb"-?[0-9]{1,18}")


def read_tar(path: Path, origin: str, start: int = 0) -> Iterator[Picture | Problem]:
    """`origin` names the tar in errors; `path` is where it lies now.  What is wrong beside a sample
    is told behind it.
    """
    key, members, beside = "", dict[str, tarfile.TarInfo](), list[Problem]()
    with open(path, "rb") as file:
        file.seek(start)

        def finished() -> Iterator[Picture | Problem]:
            if members:
                yield _tar_picture(path, origin, file.fileno(), key, members)
            yield from beside

        try:
            for name, info in _walk_tar(file, path, origin):
                if isinstance(parsed := _parse_member(name, info, origin), Problem):
                    beside.append(parsed)
                    continue
                new_key, extension = parsed
                if new_key != key:
                    yield from finished()
                    key, members, beside = new_key, {}, []
                if extension in members:
                    beside.append(
                        Problem(
                            origin,
                            f"{origin}: member {name!r} is there twice: keys are unique; pack the "
                            "tar again",
                        )
                    )
                else:
                    members[extension] = info
        # nothing behind this place can be found; the sample before it may not be whole
        except DataError as problem:
            yield from beside
            yield Problem(origin, str(problem))
            return
        yield from finished()


def _walk_tar(
    file: io.BufferedReader, path: Path, origin: str
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Members.  `tarfile` takes a damaged header, or a file cut between members, for the end: that
    is checked here.
    """
    size = path.stat().st_size
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
            for info in tar:
                name = info.name.removeprefix("./")
                if info.isdir() or name.rpartition("/")[2].startswith("."):
                    continue
                if info.size < 0 or info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"member {name[:80]!r} ends behind the file")
                yield name, info
            end = tar.offset
    except DataError:
        raise
    # tarfile meets arbitrary bytes, and raises more than TarError: RecursionError, ValueError ...
    except Exception as problem:
        raise DataError(
            f"{origin}: truncated, or not a tar ({problem}): fetch it again; decompress it if it "
            "is compressed"
        ) from None
    if os.pread(file.fileno(), BLOCK, end) != bytes(BLOCK):
        raise DataError(
            f"{origin}: truncated or damaged: at byte {end} of {size} there is neither a member "
            "nor the end mark of a tar: fetch it again"
        )
    if (position := _first_byte_behind(file.fileno(), end)) is not None:
        raise DataError(
            f"{origin}: its end mark is at byte {end} of {size}, but there is more at byte "
            f"{position}: archives put behind each "
            "other are read up to the first end mark only: pack them again as one"
        )


class _Headers:
    """A file from which `tarfile` reads headers, and no more memory than those take."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes, wanted at most {MAX_HEADER_BYTES}")
        return self._file.read(size)


def _first_byte_behind(fd: int, position: int) -> int | None:
    """Where something but zeros lies, from `position` to the end of the file."""
    while chunk := os.pread(fd, 1 << 20, position):
        if stripped := chunk.lstrip(b"\0"):
            return position + len(chunk) - len(stripped)
        position += len(chunk)
    return None


def _parse_member(name: str, info: tarfile.TarInfo, origin: str) -> tuple[str, str] | Problem:
    """(key, extension)"""
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.sparse is not None:  # type: ignore[attr-defined]
        return Problem(
            origin,
            f"{origin}: member {name[:80]!r} is a link, a device or sparse, wanted a plain file: "
            "pack the tar again",
        )
    try:
        return split_member_name(name, origin)
    except DataError as problem:
        return Problem(origin, str(problem))


def _tar_picture(
    path: Path, origin: str, fd: int, key: str, members: dict[str, tarfile.TarInfo]
) -> Picture | Problem:
    where = f"{origin}: sample {key!r}"
    found = [extension for extension in PICTURE_EXTENSIONS if extension in members]
    if len(found) != 1:
        return Problem(
            where,
            f"{where}: has {len(found)} pictures (members: {', '.join(sorted(members))}), "
            "wanted one of "
            f"{', '.join(PICTURE_EXTENSIONS)}: complete or remove the sample",
        )
    info = members[found[0]]
    try:
        said = _parse_texts(_read_texts(fd, members, where), where)
    except DataError as problem:
        return Problem(where, str(problem))
    start = min(member.offset for member in members.values())
    return Picture(
        key, f"{origin}:{key}.{found[0]}", str(path), info.offset_data, info.size, *said, start
    )


def _read_texts(fd: int, members: dict[str, tarfile.TarInfo], where: str) -> dict[str, bytes]:
    texts = {}
    for extension, most_bytes in MAX_TEXT_BYTES.items():
        if (member := members.get(extension)) is None:
            continue
        if member.size > most_bytes:
            raise DataError(
                f"{where}: its .{extension} has {member.size} bytes, wanted at most {most_bytes}: "
                "shorten it"
            )
        texts[extension] = os.pread(fd, member.size, member.offset_data)
    return texts


def _parse_texts(texts: dict[str, bytes], where: str) -> tuple[int | None, str | None, str | None]:
    """(label, class_name, caption); the caption is .txt, or else what img2dataset writes into
    .json.
    """
    facts: Any = {}
    try:
        label = parse_class_id(texts["cls"]) if "cls" in texts else None
        if "json" in texts:
            facts = json.loads(texts["json"], object_pairs_hook=_unique_keys)
        caption = texts["txt"].decode() if "txt" in texts else None
        facts = facts if isinstance(facts, dict) else {}
        class_name, told = _text_of(facts, "class_name"), _text_of(facts, "caption")
    except (ValueError, RecursionError) as problem:
        raise DataError(
            f"{where}: .cls, .json or .txt is not an integer, JSON, UTF-8 ({problem}): correct "
            "the member"
        ) from None
    if label is not None and label < 0:
        raise DataError(
            f"{where}: class id {label} is out of range, wanted 0 or more: correct its .cls"
        )
    if class_name is not None and (
        not class_name.isprintable() or len(class_name) > MAX_CLASS_NAME
    ):
        raise DataError(
            f"{where}: class_name {class_name[:80]!r} is too long or has control characters, "
            f"wanted at most {MAX_CLASS_NAME} "
            "printable ones: correct its .json"
        )
    return label, class_name, told if caption is None else caption


def parse_class_id(raw: bytes) -> int:
    """Digits in ASCII, white space around them.  Raises ValueError for the rest that `int` accepts:
    1_0, +1, other digits.
    """
    text = raw.strip(b" \t\r\n")
    if not _CLASS_ID.fullmatch(text):
        raise ValueError(f".cls is {raw[:40]!r}")
    return int(text)


def _text_of(facts: dict[str, Any], key: str) -> str | None:
    """None when it is absent, null or NaN, which tables write for what is missing."""
    value = facts.get(key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        raise ValueError(f"{key} in .json is {str(value)[:40]}, no text")
    value.encode()  # UnicodeEncodeError is a ValueError: half of a surrogate pair
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for key in ("class_name", "caption"):
        if key in found and [name for name, _ in pairs].count(key) > 1:
            raise ValueError(f"{key} is in .json twice")
    return found
