"""Pictures out of a WebDataset tar: members joined to samples, whatever is damaged told in its place."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lpl_pretrain.data.format import BLOCK, split_member_name
from lpl_pretrain.encoding.pictures import PICTURE_EXTENSIONS, Picture, Problem
from lpl_pretrain.errors import DataError


def read_tar(path: Path, origin: str, start: int = 0) -> Iterator[Picture | Problem]:
    """`origin` names the tar in errors; `path` is where it lies now.  What is wrong beside a sample is told behind it."""
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
                    beside.append(Problem(origin, f"{origin}: member {name!r} is there twice: keys are unique; pack the tar again"))
                else:
                    members[extension] = info
        except DataError as problem:  # nothing behind this place can be found; the sample before it may not be whole
            yield from beside
            yield Problem(origin, str(problem))
            return
        yield from finished()


def _walk_tar(file: io.BufferedReader, path: Path, origin: str) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Plain members.  `tarfile` takes a damaged header, or a file cut between members, for the end: that is checked here."""
    size = path.stat().st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                name = info.name.removeprefix("./")
                if info.isdir() or name.rpartition("/")[2].startswith("."):
                    continue
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"member {name!r} ends behind the file")
                yield name, info
            end = os.pread(file.fileno(), BLOCK, tar.offset)
    except tarfile.TarError as problem:
        raise DataError(
            f"{origin}: truncated, or not a tar ({problem}): fetch it again; decompress it if it is compressed"
        ) from None
    if end != bytes(BLOCK):
        raise DataError(
            f"{origin}: truncated or damaged: at byte {tar.offset} of {size} there is neither a member "
            "nor the end mark of a tar: fetch it again"
        )


def _parse_member(name: str, info: tarfile.TarInfo, origin: str) -> tuple[str, str] | Problem:
    """(key, extension)"""
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return Problem(origin, f"{origin}: member {name!r} is a link or a device, wanted a plain file: pack the tar again")
    try:
        return split_member_name(name, origin)
    except DataError as problem:
        return Problem(origin, str(problem))


def _tar_picture(path: Path, origin: str, fd: int, key: str, members: dict[str, tarfile.TarInfo]) -> Picture | Problem:
    where = f"{origin}: sample {key!r}"
    found = [extension for extension in PICTURE_EXTENSIONS if extension in members]
    if len(found) != 1:
        return Problem(
            where,
            f"{where}: has {len(found)} pictures (members: {', '.join(sorted(members))}), wanted one of "
            f"{', '.join(PICTURE_EXTENSIONS)}: complete or remove the sample",
        )
    info = members[found[0]]
    texts = {
        str(extension): os.pread(fd, members[extension].size, members[extension].offset_data)
        for extension in ("cls", "txt", "json")
        if extension in members
    }
    try:
        said = _parse_texts(texts, where)
    except DataError as problem:
        return Problem(where, str(problem))
    start = min(member.offset for member in members.values())
    return Picture(key, f"{origin}:{key}.{found[0]}", str(path), info.offset_data, info.size, *said, start)


def _parse_texts(texts: dict[str, bytes], where: str) -> tuple[int | None, str | None, str | None]:
    """(label, class_name, caption); the caption is .txt, or else what img2dataset writes into .json."""
    label: int | None = None
    facts: Any = {}
    try:
        if "cls" in texts:
            label = int(texts["cls"])
        if "json" in texts:
            facts = json.loads(texts["json"])
        caption = texts["txt"].decode() if "txt" in texts else None
    except ValueError as problem:
        raise DataError(f"{where}: .cls, .json or .txt is not an integer, JSON, UTF-8 ({problem}): correct the member") from None
    if label is not None and label < 0:
        raise DataError(f"{where}: class id {label} is out of range, wanted 0 or more: correct its .cls")
    facts = facts if isinstance(facts, dict) else {}
    class_name, told = facts.get("class_name"), facts.get("caption")
    if caption is None and isinstance(told, str):
        caption = told
    return label, class_name if isinstance(class_name, str) else None, caption
