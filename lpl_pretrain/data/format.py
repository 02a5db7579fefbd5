"""What a shard of latents is: a plain tar, which webdataset reads too, whose latents our own reader views in place.

Members of one sample, in this order:
    <key>.cls          class id in ASCII; -1 when the picture has no class
    <key>.json         facts about the picture (see encode.py)
    <key>.moments.npy  float16 (2C, H, W): the posterior's mean, then its standard deviation
    <key>.txt          caption in UTF-8, when there is one
A key has no dot after its last slash, because webdataset starts the extension at that dot.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from lpl_pretrain.errors import DataError

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
NO_CLASS = -1
MOMENTS, LABEL, FACTS, CAPTION = "moments.npy", "cls", "json", "txt"
REQUIRED = (MOMENTS, LABEL, FACTS)
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")
_DAMAGED = "copy the file again from where it is whole, or encode the folder again"


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Where the latents of a shard lie; row i is its i-th sample."""

    keys: list[str]
    labels: np.ndarray  # (N,) int64, NO_CLASS without one
    offsets: np.ndarray  # (N,) int64, first byte of the .npy in the file
    sizes: np.ndarray  # (N,) int64, bytes of the .npy


def shard_name(number: int) -> str:
    return f"latents-{number:06d}.tar"


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def split_member_name(name: str, where: str) -> tuple[str, str]:
    """(key, extension) as webdataset splits them.  `where` names the member in errors."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or _UNSAFE.search(name):
        raise DataError(
            f"{where}: the member name {name!r} is not a plain relative path: pack the tar again without "
            "absolute paths, `..`, backslashes or control characters"
        )
    stem, dot, extension = parts[-1].partition(".")
    if not stem or not dot or not extension:
        raise DataError(f"{where}: the member name {name!r} is not <key>.<extension>: remove it from the tar or rename it")
    return "/".join([*parts[:-1], stem]), extension.lower()


def pack_sample(key: str, moments: np.ndarray, label: int | None, caption: str | None, facts: dict[str, Any]) -> bytes:
    """The bytes of one sample in a shard; a function of the arguments alone (no clock, no owner)."""
    assert moments.dtype == np.float16 and moments.ndim == 3, (moments.dtype, moments.shape)
    buffer = io.BytesIO()
    np.save(buffer, moments, allow_pickle=False)
    members = {
        LABEL: str(NO_CLASS if label is None else label).encode(),
        FACTS: json.dumps(facts, sort_keys=True).encode(),
        MOMENTS: buffer.getvalue(),
        CAPTION: None if caption is None else caption.encode(),
    }
    return b"".join(_tar_member(f"{key}.{extension}", data) for extension, data in members.items() if data is not None)


def parse_moments(blob: bytes, shape: tuple[int, int, int], where: str) -> np.ndarray:
    """A float16 view of an .npy's bytes.  Raises DataError when it is anything but float16 of this shape."""
    header = _npy_header(shape)
    values = blob[len(header) :]
    if not blob.startswith(header):
        values = _after_other_header(blob, shape, where)
    wanted = 2 * shape[0] * shape[1] * shape[2]
    if len(values) != wanted:
        raise DataError(f"{where}: {MOMENTS} has {len(values)} bytes of values, wanted {wanted}: {_DAMAGED}")
    return np.frombuffer(values, dtype="<f2").reshape(shape)


def scan_shard(path: Path) -> ShardLayout:
    """Walk the tar's headers.  Raises DataError for a truncated or damaged tar, a missing member, a repeated key."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with open(path, "rb") as file:
        for name, offset, size in _walk_tar(file.fileno(), path):
            key, extension = split_member_name(name, f"{path}")
            members = samples.setdefault(key, {})
            if extension in members:
                raise DataError(f"{path}: sample {key!r} is there twice ({name}), wanted unique keys: encode the folder again")
            members[extension] = (offset, size)
        for key, members in samples.items():
            if missing := [extension for extension in REQUIRED if extension not in members]:
                raise DataError(f"{path}: sample {key!r} has {', '.join(members)}, but no {missing[0]}: encode the folder again")
        labels = [_read_label(file.fileno(), *members[LABEL], f"{path}: sample {key!r}") for key, members in samples.items()]
    moments = np.array([members[MOMENTS] for members in samples.values()], dtype=np.int64).reshape(-1, 2)
    return ShardLayout(list(samples), np.array(labels, dtype=np.int64), moments[:, 0], moments[:, 1])


def _tar_member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode, info.uname, info.gname = len(data), 0, 0o444, "lpl", "lpl"
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % BLOCK)


def _walk_tar(fd: int, path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each member; what GNU tar calls long names is understood, other extensions are not."""
    position, long_name = 0, None
    while True:
        block = os.pread(fd, BLOCK, position)
        if len(block) < BLOCK:
            raise DataError(f"{path}: truncated: {os.fstat(fd).st_size} bytes and no end mark of a tar: {_DAMAGED}")
        if not any(block):
            return
        name, size, kind = _parse_header(block, f"{path}: byte {position}")
        start = position + BLOCK
        position = start + size + -size % BLOCK
        if kind == b"L":
            long_name = os.pread(fd, size, start).rstrip(b"\0").decode(errors="surrogateescape")
        elif kind in (b"0", b"\0"):
            yield long_name or name, start, size
            long_name = None
        else:
            raise DataError(f"{path}: member {name!r} has type {kind!r}, wanted a plain file: encode the folder again")


def _parse_header(block: bytes, where: str) -> tuple[str, int, bytes]:
    try:
        checksum, size = (int(block[field].strip(b"\0 "), 8) for field in (slice(148, 156), slice(124, 136)))
    except ValueError:
        checksum, size = -1, 0
    if checksum != sum(block[:148]) + sum(block[156:]) + 8 * ord(" "):
        raise DataError(f"{where}: no tar header, or a damaged one: {_DAMAGED}")
    name, prefix = (block[field].split(b"\0", 1)[0].decode(errors="surrogateescape") for field in (slice(0, 100), slice(345, 500)))
    is_ustar = block[257:263] == b"ustar\0"
    return f"{prefix}/{name}" if is_ustar and prefix else name, size, block[156:157]


def _read_label(fd: int, offset: int, size: int, where: str) -> int:
    text = os.pread(fd, size, offset)
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{where}: .{LABEL} holds {text[:40]!r}, wanted a class id such as 3: encode the folder again") from None


@lru_cache(maxsize=8)
def _npy_header(shape: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _after_other_header(blob: bytes, shape: tuple[int, int, int], where: str) -> bytes:
    """The values behind a header that is not, byte for byte, the one we write: either it means the same or it is refused."""
    stream = io.BytesIO(blob)
    try:
        if npy.read_magic(stream) != (1, 0):
            raise ValueError("wanted version 1.0 of the format")
        found_shape, fortran_order, dtype = npy.read_array_header_1_0(stream)
    except ValueError as problem:
        raise DataError(f"{where}: {MOMENTS} is not a numpy array ({problem}): {_DAMAGED}") from None
    if found_shape != shape or dtype != np.dtype("<f2") or fortran_order:
        raise DataError(f"{where}: {MOMENTS} is {dtype} {found_shape}, index.json wants float16 {shape}: encode the folder again")
    return blob[stream.tell() :]
