"""What a shard of latents is: a plain tar, which webdataset reads too, whose latents our own reader
views in place.

Samples stand in the order of their keys, and the members of one in the order of their names:
    <key>.cls                    class id in ASCII; -1 when the picture has no class
    <key>.json                   facts about the picture (see encoding/encode.py)
    <key>.moments.npy            (2C, H, W): the posterior's mean, then its standard deviation; float16, or the bits of bfloat16
                                 as uint16, a type that numpy lacks:
                                 torch.from_numpy(bits).view(torch.bfloat16)
    <key>.moments_flipped.npy    the same of the mirrored picture, when there is one
    <key>.text_<name>.npy        (T, D) states of the caption's T tokens by encoder <name>: float16, or int8 to be multiplied by
    <key>.text_<name>_scale.npy  (T,) float16
    <key>.text_<name>_pooled.npy (P,) float16, when the encoder gives one and the configuration asks
    for it
    <key>.txt                    caption in UTF-8, when there is one
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
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from lpl_pretrain.errors import DataError

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
NO_CLASS = -1
MOMENTS, FLIPPED, LABEL, FACTS, CAPTION = "moments.npy", "moments_flipped.npy", "cls", "json", "txt"
REQUIRED = (MOMENTS, LABEL, FACTS)
DTYPES = {"fp16": "<f2", "bf16": "<u2"}
"""How numpy names the stored type of moments."""
DAMAGED = "copy the file again from where it is whole, or encode the folder again"
MAX_NAME_BYTES = 4096
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]")
"""Control characters, backslashes, and bytes that are not UTF-8."""
_OCTAL = re.compile(rb"[0-7]{1,12}")


@dataclass(frozen=True, slots=True)
class EncodedText:
    """What one encoder made of a caption; T is its true length, without padding."""

    tokens: np.ndarray  # (T, D) float16 or int8
    scale: np.ndarray | None = None  # (T,) float16, with int8
    pooled: np.ndarray | None = None  # (P,) float16

    def floats(self) -> np.ndarray:
        """(T, D) float32"""
        states = self.tokens.astype(np.float32)
        return states if self.scale is None else states * self.scale.astype(np.float32)[:, None]


@dataclass(frozen=True, slots=True)
class Sample:
    key: str
    moments: np.ndarray  # (2C, H, W) float16, or uint16: the bits of bfloat16
    label: int | None = None
    caption: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    flipped: np.ndarray | None = None  # as moments
    text: dict[str, EncodedText] = field(default_factory=dict)

    def members(self) -> dict[str, bytes]:
        """Extension -> content; a function of the sample alone (no clock, no owner)."""
        members = {
            LABEL: str(NO_CLASS if self.label is None else self.label).encode(),
            FACTS: json.dumps(self.facts, sort_keys=True).encode(),
            MOMENTS: _npy_bytes(self.moments),
        }
        if self.flipped is not None:
            members[FLIPPED] = _npy_bytes(self.flipped)
        for name, text in self.text.items():
            arrays = dict(
                zip(text_members(name), (text.tokens, text.scale, text.pooled), strict=True)
            )
            members |= {
                extension: _npy_bytes(array)
                for extension, array in arrays.items()
                if array is not None
            }
        if self.caption is not None:
            members[CAPTION] = self.caption.encode()
        return dict(sorted(members.items()))


def null_text_name(name: str) -> str:
    """File of a folder with the embedding of the empty caption: `tokens` (T, D) float32, and
    `pooled` (P,) where there is one.
    """
    return f"text_{name}.null.safetensors"


def text_members(name: str) -> tuple[str, str, str]:
    """Extensions of one encoder's tokens, scale and pooled vector."""
    return f"text_{name}.npy", f"text_{name}_scale.npy", f"text_{name}_pooled.npy"


def shard_name(part: str, number: int, bucket: str) -> str:
    return f"latents-{part}-{number:03d}-{bucket}.tar"


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
            f"{where}: the member name {name[:200]!r} is not a plain relative path: pack the tar "
            "again without "
            "absolute paths, `..`, backslashes, control characters or names that are not UTF-8"
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


def pack_sample(sample: Sample) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes of one sample in a shard, and where in them each member's content lies: extension
    -> (offset, size).
    """
    packed, places = bytearray(), {}
    for extension, content in sample.members().items():
        member = _tar_member(f"{sample.key}.{extension}", content)
        places[extension] = (
            len(packed) + len(member) - len(content) - -len(content) % BLOCK,
            len(content),
        )
        packed += member
    return bytes(packed), places


def scan_shard(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> extension -> (offset, size) by walking the tar's headers, in their order.

    Raises DataError for a truncated or damaged tar, a missing member, a repeated key.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with open(path, "rb") as file:
        for name, offset, size in walk_tar(file.fileno(), path):
            key, extension = split_member_name(name, f"{path}")
            members = samples.setdefault(key, {})
            if extension in members:
                raise DataError(
                    f"{path}: sample {key!r} is there twice ({name}), wanted unique keys: encode "
                    "the folder again"
                )
            members[extension] = (offset, size)
    for key, members in samples.items():
        if missing := [extension for extension in REQUIRED if extension not in members]:
            raise DataError(
                f"{path}: sample {key!r} has {', '.join(members)}, but no {missing[0]}: encode the "
                "folder again"
            )
    return samples


@lru_cache(maxsize=1024)
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What our .npy members of this type and shape start with."""
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _tar_member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode, info.uname, info.gname = len(data), 0, 0o444, "lpl", "lpl"
    return (
        info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        + data
        + bytes(-len(data) % BLOCK)
    )


def walk_tar(fd: int, path: Path, position: int = 0) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each member from `position` on; GNU tar's long names are understood,
    other extensions are not.
    """
    long_name = None
    while True:
        block = os.pread(fd, BLOCK, position)
        if len(block) < BLOCK:
            raise DataError(
                f"{path}: truncated: {os.fstat(fd).st_size} bytes and no end mark of a tar: "
                f"{DAMAGED}"
            )
        if not any(block):
            return
        name, size, kind = _parse_header(block, f"{path}: byte {position}")
        start = position + BLOCK
        position = start + size + -size % BLOCK
        if kind == b"L":
            if size > 2 * MAX_NAME_BYTES:
                raise DataError(f"{path}: byte {start}: a member name of {size} bytes: {DAMAGED}")
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
    fields = [block[field].strip(b"\0 ") for field in (slice(148, 156), slice(124, 136))]
    checksum, size = (int(text, 8) if _OCTAL.fullmatch(text) else -1 for text in fields)
    if size < 0 or checksum != sum(block[:148]) + sum(block[156:]) + 8 * ord(" "):
        raise DataError(f"{where}: no tar header, or a damaged one: {DAMAGED}")
    name, prefix = (
        block[field].split(b"\0", 1)[0].decode(errors="surrogateescape")
        for field in (slice(0, 100), slice(345, 500))
    )
    is_ustar = block[257:263] == b"ustar\0"
    return f"{prefix}/{name}" if is_ustar and prefix else name, size, block[156:157]


def _npy_bytes(array: np.ndarray) -> bytes:
    return npy_header(array.dtype.str, array.shape) + array.tobytes()
