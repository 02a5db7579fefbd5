"""Tar members as shards have them: splits their names, packs them, walks their headers.

The walk is strict: it accepts plain files and GNU long names, as this project writes them, and
refuses headers that `tarfile` would read leniently.  encoding/tars.py reads the tars of others with
`tarfile`, because they may have pax headers, folders or links.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from lpl_pretrain.config.dataset import REMEDY
from lpl_pretrain.errors import DataError

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
MAX_NAME_BYTES = 4096
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]")
"""Control characters, backslashes, and bytes that are not UTF-8."""
_OCTAL = re.compile(rb"[0-7]{1,12}")
# fields of a header, as POSIX ustar has them
_NAME = slice(0, 100)
_SIZE = slice(124, 136)
_CHECKSUM = slice(148, 156)
_TYPE = slice(156, 157)
_MAGIC = slice(257, 263)
_PREFIX = slice(345, 500)


def split_member_name(name: str, where: str) -> tuple[str, str]:
    """(key, extension) as webdataset splits a member's name.

    `where` names the member in errors.  Raises DataError for a name that is no plain relative path,
    is too long, or has no extension.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or _UNSAFE.search(name):
        raise DataError(
            f"{where}: the member name {name[:200]!r} is not a plain relative path: pack the tar "
            "again without absolute paths, `..`, backslashes, control characters or names that "
            "are not UTF-8"
        )
    if len(name.encode()) > MAX_NAME_BYTES:
        raise DataError(
            f"{where}: the member name {name[:60]!r}... has more than {MAX_NAME_BYTES} bytes: "
            "shorten it"
        )
    stem, dot, extension = parts[-1].partition(".")
    if not stem or not dot or not extension:
        raise DataError(
            f"{where}: the member name {name[:200]!r} is not <key>.<extension>: remove it from the "
            "tar or rename it"
        )
    return "/".join([*parts[:-1], stem]), extension.lower()


def tar_member(name: str, content: bytes) -> bytes:
    """Header and padded content of one member: a function of its arguments alone (no clock, no
    owner).
    """
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mtime = 0
    info.mode = 0o444
    info.uname = "lpl"
    info.gname = "lpl"
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return header + content + bytes(-len(content) % BLOCK)


def walk_tar(fd: int, path: Path, position: int = 0) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the content, size) of each member from byte `position` on.

    `path` names the tar in errors.  Raises DataError for a truncated tar, a damaged header, and a
    member that is not a plain file.
    """
    long_name = None
    while True:
        block = os.pread(fd, BLOCK, position)
        if len(block) < BLOCK:
            raise DataError(
                f"{path}: truncated: {os.fstat(fd).st_size} bytes and no end mark of a tar: "
                f"{REMEDY}"
            )
        if not any(block):
            return
        name, size, kind = _parse_header(block, f"{path}: byte {position}")
        start = position + BLOCK
        position = start + size + -size % BLOCK
        if kind == b"L":
            if size > 2 * MAX_NAME_BYTES:
                raise DataError(f"{path}: byte {start}: a member name of {size} bytes: {REMEDY}")
            long_name = os.pread(fd, size, start).rstrip(b"\0").decode(errors="surrogateescape")
        elif kind in (b"0", b"\0"):
            yield long_name or name, start, size
            long_name = None
        else:
            raise DataError(
                f"{path}: member {name!r} has type {kind!r}, wanted a plain file: encode the "
                "folder again"
            )


def _parse_header(block: bytes, where: str) -> tuple[str, int, bytes]:
    """(name, size, type flag)"""
    checksum = _parse_octal(block[_CHECKSUM])
    size = _parse_octal(block[_SIZE])
    # the sum of all bytes, with spaces for the checksum itself
    computed = sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")
    if size is None or checksum != computed:
        raise DataError(f"{where}: no tar header, or a damaged one: {REMEDY}")
    name = _parse_text(block[_NAME])
    prefix = _parse_text(block[_PREFIX])
    is_ustar = block[_MAGIC] == b"ustar\0"
    return f"{prefix}/{name}" if is_ustar and prefix else name, size, block[_TYPE]


def _parse_octal(field: bytes) -> int | None:
    digits = field.strip(b"\0 ")
    return int(digits, 8) if _OCTAL.fullmatch(digits) else None


def _parse_text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="surrogateescape")
