"""Where in a shard everything lies: a small file beside each tar, so that nobody walks headers to
find a sample.

`latents-....offsets.safetensors` holds one row per sample, in the order of the tar.  It can be made
again from the tar alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from lpl_pretrain.config.dataset import ShardEntry
from lpl_pretrain.data.format import (
    DAMAGED,
    END_OF_ARCHIVE,
    FACTS,
    LABEL,
    MOMENTS,
    NO_CLASS,
    Sample,
    pack_sample,
    split_member_name,
    walk_tar,
)
from lpl_pretrain.errors import DataError

SUFFIX = ".offsets.safetensors"
MAX_BYTES_PER_SAMPLE, MAX_HEADER_BYTES = 4096, 1 << 20
"""Of an offsets file."""
MICRO = ("source_px", "resized_px", "crop_px")
"""Facts that SDXL conditions on (arXiv 2307.01952, section 2.2): (height, width) before and after
resizing, (top, left) of the crop.
"""


FIXED: dict[str, tuple[str, tuple[int, ...]]] = {
    "start": ("int64", ()),
    "end": ("int64", ()),
    "crc32": ("uint32", ()),
    "label": ("int32", ()),
    "micro": ("int32", (6,)),
    "key_hash": ("uint64", ()),
    "moments": ("int64", ()),
}
"""Fields of `Offsets` that every file has: (dtype, shape of one row)."""
_MEMBER = re.compile(r"member/[a-z0-9_.]{1,100}")


@dataclass(frozen=True, slots=True)
class Offsets:
    start: np.ndarray  # (N,) int64, first byte of the sample in the tar
    end: np.ndarray  # (N,) int64, one behind its last
    crc32: np.ndarray  # (N,) uint32, of these bytes
    label: np.ndarray  # (N,) int32, NO_CLASS without one
    micro: np.ndarray  # (N, 6) int32, as MICRO; -1 unknown
    # (N,) uint64, first bytes of BLAKE2b of the key: finds keys that are there twice in a data set
    key_hash: np.ndarray
    moments: np.ndarray  # (N,) int64, first byte of the .npy
    members: dict[
        str, np.ndarray
    ]  # extension -> (N, 2) int64 (first byte, size), size -1 where a sample has none

    def __len__(self) -> int:
        return len(self.start)

    def to_bytes(self) -> bytes:
        fixed = {name: getattr(self, name) for name in FIXED}
        return save(
            fixed
            | {f"member/{extension}": places for extension, places in sorted(self.members.items())}
        )

    @classmethod
    def read(cls, path: Path, entry: ShardEntry) -> Offsets:
        """Raises DataError unless the file is the one that index.json means, and describes a shard
        like `entry`.
        """
        sha256, most_bytes = (
            entry.offsets_sha256,
            MAX_HEADER_BYTES + MAX_BYTES_PER_SAMPLE * entry.samples,
        )
        try:
            if (size := path.stat().st_size) > most_bytes:
                raise DataError(f"{path}: has {size} bytes, wanted at most {most_bytes}: {DAMAGED}")
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}): {DAMAGED}") from None
        if (found := hashlib.sha256(raw).hexdigest()) != sha256:
            raise DataError(f"{path}: sha256 is {found}, index.json says {sha256}: {DAMAGED}")
        try:
            arrays = load(raw)
        except Exception as error:  # safetensors raises errors of several kinds on arbitrary bytes
            raise DataError(f"{path}: not a safetensors file ({error}): {DAMAGED}") from None
        if problem := _array_problem(arrays, entry):
            raise DataError(f"{path}: {problem}: encode the folder again")
        members = {
            name.removeprefix("member/"): arrays.pop(name)
            for name in list(arrays)
            if name.startswith("member/")
        }
        offsets = cls(**arrays, members=members)
        if problem := offsets.range_problem(entry.bytes):
            raise DataError(f"{path}: {problem}: encode the folder again")
        return offsets

    def range_problem(self, shard_bytes: int) -> str | None:
        """What lies outside the shard, or outside its sample."""
        ends = np.concatenate([np.zeros(1, np.int64), self.end])
        if (
            (self.start < ends[:-1]).any()
            or (self.end <= self.start).any()
            or ends[-1] > shard_bytes
        ):
            return f"samples overlap, or lie behind the {shard_bytes} bytes of the shard"
        if (self.moments < self.start).any() or (self.moments >= self.end).any():
            return "moments lie outside their sample"
        for extension, places in self.members.items():
            there = places[:, 1] >= 0
            first, size, start, end = (
                places[there, 0],
                places[there, 1],
                self.start[there],
                self.end[there],
            )
            if (first < start).any() or (first > end).any() or (size > end - first).any():
                return f"{extension} lies outside its sample"
        return None


class ShardBuilder:
    """A shard in the making: samples in any order, put out by key."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []

    def __len__(self) -> int:
        return len(self.samples)

    def finish(self) -> tuple[list[bytes], Offsets]:
        """The tar in pieces, and where everything lies in it."""
        ordered = sorted(self.samples, key=lambda sample: sample.key)
        pieces, starts, places = [], [], []
        position = 0
        for sample in ordered:
            packed, inside = pack_sample(sample)
            pieces.append(packed)
            starts.append(position)
            places.append(
                {
                    extension: (position + offset, size)
                    for extension, (offset, size) in inside.items()
                }
            )
            position += len(packed)
        start = np.array(starts, dtype=np.int64)
        extensions = sorted(
            {name for sample in places for name in sample} - {LABEL, FACTS, MOMENTS}
        )
        offsets = Offsets(
            start=start,
            end=np.append(start[1:], position).astype(np.int64),
            crc32=np.array([zlib.crc32(piece) for piece in pieces], dtype=np.uint32),
            label=np.array(
                [NO_CLASS if sample.label is None else sample.label for sample in ordered],
                dtype=np.int32,
            ),
            micro=np.array([_micro(sample) for sample in ordered], dtype=np.int32),
            key_hash=key_hashes([sample.key for sample in ordered]),
            moments=np.array([sample[MOMENTS][0] for sample in places], dtype=np.int64),
            members={
                name: np.array([sample.get(name, (-1, -1)) for sample in places], dtype=np.int64)
                for name in extensions
            },
        )
        return [*pieces, END_OF_ARCHIVE], offsets


def key_hashes(keys: list[str]) -> np.ndarray:
    digests = b"".join(
        hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
        for key in keys
    )
    return np.frombuffer(digests, dtype=np.uint64)


def key_at(path: Path, offsets: Offsets, row: int) -> str:
    """The key of a sample, for errors; its place alone when the tar is too damaged to tell."""
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            name, _, _ = next(walk_tar(fd, path, int(offsets.start[row])))
            return split_member_name(name, str(path))[0]
        finally:
            os.close(fd)
    except (OSError, DataError, StopIteration):
        return f"number {row}, bytes {offsets.start[row]} to {offsets.end[row]}"


def _array_problem(arrays: dict[str, np.ndarray], entry: ShardEntry) -> str | None:
    """What is not as `Offsets` says."""
    if missing := FIXED.keys() - arrays.keys():
        return f"has no {sorted(missing)[0]}"
    for name, array in arrays.items():
        if name not in FIXED and not _MEMBER.fullmatch(name):
            return f"holds {name[:80]!r}, which is no array of offsets"
        dtype, width = FIXED.get(name, ("int64", (2,)))
        if array.dtype != dtype or array.ndim != 1 + len(width) or array.shape[1:] != width:
            return (
                f"{name} is {array.dtype} {array.shape}, wanted {dtype} {(entry.samples, *width)}"
            )
        if len(array) != entry.samples:
            return f"has {len(array)} samples, index.json says {entry.samples} in {entry.file}"
    return None


def _micro(sample: Sample) -> list[int]:
    return [int(value) for name in MICRO for value in sample.facts.get(name, (-1, -1))]
