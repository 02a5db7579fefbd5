"""Lists the images of a WebDataset tar: groups members to samples, and lists a `BadImage` for each
unreadable one.
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
from lpl_pretrain.encoding.source_image import IMAGE_EXTENSIONS, BadImage, SourceImage
from lpl_pretrain.errors import DataError

MAX_HEADER_BYTES = 1 << 20
MAX_TEXT_BYTES = {"cls": 64, "txt": 1 << 20, "json": 16 << 20}
"""Extension -> limit for members whose content is read while a tar is listed."""
MAX_CLASS_NAME = 1000
_CLASS_ID = re.compile(rb"-?[0-9]{1,18}")


def read_tar(path: Path, origin: str, start: int = 0) -> Iterator[SourceImage | BadImage]:
    """The samples of the tar at `path` from byte `start` on; `origin` names it in errors.

    Bad members that belong to no sample follow the sample before them.
    """
    key = ""
    members: dict[str, tarfile.TarInfo] = {}
    bad_members: list[BadImage] = []
    with open(path, "rb") as file:
        file.seek(start)

        def finish_sample() -> Iterator[SourceImage | BadImage]:
            if members:
                yield _tar_image(path, origin, file.fileno(), key, members)
            yield from bad_members

        try:
            for name, info in _walk_tar(file, path, origin):
                parsed = _parse_member(name, info, origin)
                if isinstance(parsed, BadImage):
                    bad_members.append(parsed)
                    continue
                new_key, extension = parsed
                if new_key != key:
                    yield from finish_sample()
                    key = new_key
                    members = {}
                    bad_members = []
                if extension in members:
                    reason = (
                        f"{origin}: member {name!r} is there twice: keys are unique; pack the "
                        "tar again"
                    )
                    bad_members.append(BadImage(origin, reason))
                else:
                    members[extension] = info
        except DataError as error:
            # no later sample can be located, and the sample before may be incomplete
            yield from bad_members
            yield BadImage(origin, str(error))
            return
        yield from finish_sample()


def _walk_tar(
    file: io.BufferedReader, path: Path, origin: str
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """(name, header) of each member that is no folder and no hidden file.

    Raises DataError for a corrupt or truncated tar.  `tarfile` takes a damaged header, or a
    truncation between members, for the end of the tar; both are checked here.
    """
    size = path.stat().st_size
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
            for info in tar:
                name = info.name.removeprefix("./")
                if info.isdir() or name.rpartition("/")[2].startswith("."):
                    continue
                if info.size < 0 or info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"member {name[:80]!r} ends after the file")
                yield name, info
            end = tar.offset
    except DataError:
        raise
    # tarfile meets arbitrary bytes, and raises more than TarError: RecursionError, ValueError ...
    except Exception as error:
        raise DataError(
            f"{origin}: truncated, or not a tar ({error}): fetch it again; decompress it if it "
            "is compressed"
        ) from None
    if os.pread(file.fileno(), BLOCK, end) != bytes(BLOCK):
        raise DataError(
            f"{origin}: truncated or damaged: at byte {end} of {size} there is neither a member "
            "nor the end mark of a tar: fetch it again"
        )
    if (position := _first_nonzero_byte(file.fileno(), end)) is not None:
        raise DataError(
            f"{origin}: its end mark is at byte {end} of {size}, but there is more at byte "
            f"{position}: concatenated archives are read up to the first end mark only: pack them "
            "again as one"
        )


class _Headers:
    """File from which `tarfile` can read headers only, so that a corrupt size field allocates
    nothing.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes, wanted at most {MAX_HEADER_BYTES}")
        return self._file.read(size)


def _first_nonzero_byte(fd: int, position: int) -> int | None:
    """Position of the first non-zero byte from `position` on; None if there is none."""
    while chunk := os.pread(fd, 1 << 20, position):
        if stripped := chunk.lstrip(b"\0"):
            return position + len(chunk) - len(stripped)
        position += len(chunk)
    return None


def _parse_member(name: str, info: tarfile.TarInfo, origin: str) -> tuple[str, str] | BadImage:
    """(key, extension)"""
    is_sparse = info.sparse is not None  # type: ignore[attr-defined]
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or is_sparse:
        return BadImage(
            origin,
            f"{origin}: member {name[:80]!r} is a link, a device or sparse, wanted a plain file: "
            "pack the tar again",
        )
    try:
        return split_member_name(name, origin)
    except DataError as error:
        return BadImage(origin, str(error))


def _tar_image(
    path: Path, origin: str, fd: int, key: str, members: dict[str, tarfile.TarInfo]
) -> SourceImage | BadImage:
    """The image of one sample, given the headers of its members by extension."""
    where = f"{origin}: sample {key!r}"
    extensions = [extension for extension in IMAGE_EXTENSIONS if extension in members]
    if len(extensions) != 1:
        return BadImage(
            where,
            f"{where}: has {len(extensions)} images (members: {', '.join(sorted(members))}), "
            f"wanted one of {', '.join(IMAGE_EXTENSIONS)}: complete or remove the sample",
        )
    extension = extensions[0]
    try:
        contents = _read_text_members(fd, members, where)
        label, class_name, caption = _parse_text_members(contents, where)
    except DataError as error:
        return BadImage(where, str(error))
    return SourceImage(
        key=key,
        origin=f"{origin}:{key}.{extension}",
        path=str(path),
        offset=members[extension].offset_data,
        size=members[extension].size,
        label=label,
        class_name=class_name,
        caption=caption,
        start=min(member.offset for member in members.values()),
    )


def _read_text_members(
    fd: int, members: dict[str, tarfile.TarInfo], where: str
) -> dict[str, bytes]:
    """Extension -> content of the members in MAX_TEXT_BYTES."""
    contents = {}
    for extension, most_bytes in MAX_TEXT_BYTES.items():
        if (member := members.get(extension)) is None:
            continue
        if member.size > most_bytes:
            raise DataError(
                f"{where}: its .{extension} has {member.size} bytes, wanted at most {most_bytes}: "
                "shorten it"
            )
        contents[extension] = os.pread(fd, member.size, member.offset_data)
    return contents


def _parse_text_members(
    contents: dict[str, bytes], where: str
) -> tuple[int | None, str | None, str | None]:
    """(label, class_name, caption); the caption is .txt or, as img2dataset stores it, in .json."""
    metadata: Any = {}
    try:
        label = parse_class_id(contents["cls"]) if "cls" in contents else None
        if "json" in contents:
            metadata = json.loads(contents["json"], object_pairs_hook=_refuse_repeated_keys)
        caption = contents["txt"].decode() if "txt" in contents else None
        metadata = metadata if isinstance(metadata, dict) else {}
        class_name = _text_field(metadata, "class_name")
        json_caption = _text_field(metadata, "caption")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: .cls, .json or .txt is not an integer, JSON, UTF-8 ({error}): correct "
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
            f"wanted at most {MAX_CLASS_NAME} printable ones: correct its .json"
        )
    return label, class_name, json_caption if caption is None else caption


def parse_class_id(raw: bytes) -> int:
    """Class id from ASCII digits with white space around them.

    Raises ValueError for the other texts that `int` accepts: 1_0, +1, digits of other scripts.
    """
    text = raw.strip(b" \t\r\n")
    if not _CLASS_ID.fullmatch(text):
        raise ValueError(f".cls is {raw[:40]!r}")
    return int(text)


def _text_field(metadata: dict[str, Any], key: str) -> str | None:
    """Text of a field; None if it is absent, null or NaN (a missing value of a table)."""
    value = metadata.get(key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        raise ValueError(f"{key} in .json is {str(value)[:40]}, no text")
    value.encode()  # UnicodeEncodeError is a ValueError: half of a surrogate pair
    return value


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a repeated `class_name` or `caption`."""
    for key in ("class_name", "caption"):
        if [name for name, _ in pairs].count(key) > 1:
            raise ValueError(f"{key} is in .json twice")
    return dict(pairs)
