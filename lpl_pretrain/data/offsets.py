"""Byte offsets of the samples in a shard: a small file beside each tar, so that a sample is read
without walking headers.

`latents-....offsets.safetensors` holds one row per sample, in the order of the tar.  The tar alone
suffices to compute it again.
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

from lpl_pretrain.config.dataset import REMEDY, ShardEntry
from lpl_pretrain.data.format import LABEL, METADATA, MOMENTS, NO_CLASS, Sample, pack_sample
from lpl_pretrain.data.tar import END_OF_ARCHIVE, split_member_name, walk_tar
from lpl_pretrain.errors import DataError

SUFFIX = ".offsets.safetensors"
MAX_BYTES_PER_SAMPLE = 4096
"""Limit on the size of an offsets file, per sample of the shard."""
MAX_HEADER_BYTES = 1 << 20
MICRO_CONDITIONING = ("source_px", "resized_px", "crop_px")
"""Metadata for SDXL's micro-conditioning (arXiv 2307.01952, section 2.2): (height, width) before
and after resizing, (top, left) of the crop.
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
    """Offsets of the N samples of one shard; the fields are the tensors of the file."""

    start: np.ndarray  # (N,) int64, first byte of the sample in the tar
    end: np.ndarray  # (N,) int64, one past its last byte
    crc32: np.ndarray  # (N,) uint32, of these bytes
    label: np.ndarray  # (N,) int32, NO_CLASS without one
    micro: np.ndarray  # (N, 6) int32, MICRO_CONDITIONING; -1: unknown
    # (N,) uint64, first bytes of BLAKE2b of the key: finds keys that a data set has twice
    key_hash: np.ndarray
    moments: np.ndarray  # (N,) int64, first byte of the .npy
    # extension -> (N, 2) int64 (first byte, size); size -1 where a sample has no such member
    members: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.start)

    def to_bytes(self) -> bytes:
        """Content of the offsets file."""
        tensors = {name: getattr(self, name) for name in FIXED}
        for extension, spans in sorted(self.members.items()):
            tensors[f"member/{extension}"] = spans
        return save(tensors)

    @classmethod
    def read(cls, path: Path, entry: ShardEntry) -> Offsets:
        """Raises DataError unless the file has the digest that index.json records, and describes a
        shard like `entry`.
        """
        max_bytes = MAX_HEADER_BYTES + MAX_BYTES_PER_SAMPLE * entry.samples
        try:
            if (size := path.stat().st_size) > max_bytes:
                raise DataError(f"{path}: has {size} bytes, wanted at most {max_bytes}: {REMEDY}")
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}): {REMEDY}") from None
        sha256 = hashlib.sha256(raw).hexdigest()
        if sha256 != entry.offsets_sha256:
            raise DataError(
                f"{path}: sha256 is {sha256}, index.json says {entry.offsets_sha256}: {REMEDY}"
            )
        try:
            arrays = load(raw)
        except Exception as error:  # safetensors raises errors of several kinds on arbitrary bytes
            raise DataError(f"{path}: not a safetensors file ({error}): {REMEDY}") from None
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
        """First offset that is outside the shard or outside its sample, as text, or None."""
        ends = np.concatenate([np.zeros(1, np.int64), self.end])
        overlaps = (self.start < ends[:-1]).any() or (self.end <= self.start).any()
        if overlaps or ends[-1] > shard_bytes:
            return f"samples overlap, or are beyond the {shard_bytes} bytes of the shard"
        if (self.moments < self.start).any() or (self.moments >= self.end).any():
            return "moments are outside their sample"
        for extension, spans in self.members.items():
            present = spans[:, 1] >= 0
            first = spans[present, 0]
            size = spans[present, 1]
            start = self.start[present]
            end = self.end[present]
            if (first < start).any() or (first > end).any() or (size > end - first).any():
                return f"{extension} is outside its sample"
        return None


class ShardBuilder:
    """Collects the samples of one shard, in any order."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []

    def __len__(self) -> int:
        return len(self.samples)

    def finish(self) -> tuple[list[bytes], Offsets]:
        """(the tar in chunks, its offsets), samples sorted by key."""
        ordered = sorted(self.samples, key=lambda sample: sample.key)
        chunks = []
        starts = []
        spans: list[dict[str, tuple[int, int]]] = []  # of each sample: extension -> (offset, size)
        position = 0
        for sample in ordered:
            packed, sample_spans = pack_sample(sample)
            chunks.append(packed)
            starts.append(position)
            spans.append(
                {
                    extension: (position + offset, size)
                    for extension, (offset, size) in sample_spans.items()
                }
            )
            position += len(packed)
        start = np.array(starts, dtype=np.int64)
        extensions = {name for sample_spans in spans for name in sample_spans}
        offsets = Offsets(
            start=start,
            end=np.append(start[1:], position).astype(np.int64),
            crc32=np.array([zlib.crc32(chunk) for chunk in chunks], dtype=np.uint32),
            label=np.array(
                [NO_CLASS if sample.label is None else sample.label for sample in ordered],
                dtype=np.int32,
            ),
            micro=np.array([_micro_conditioning(sample) for sample in ordered], dtype=np.int32),
            key_hash=key_hashes([sample.key for sample in ordered]),
            moments=np.array([sample_spans[MOMENTS][0] for sample_spans in spans], dtype=np.int64),
            members={
                name: np.array(
                    [sample_spans.get(name, (-1, -1)) for sample_spans in spans], dtype=np.int64
                )
                for name in sorted(extensions - {LABEL, METADATA, MOMENTS})
            },
        )
        return [*chunks, END_OF_ARCHIVE], offsets


def key_hashes(keys: list[str]) -> np.ndarray:
    """(N,) uint64, as Offsets.key_hash."""
    digests = b"".join(
        hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
        for key in keys
    )
    return np.frombuffer(digests, dtype=np.uint64)


def key_at(path: Path, offsets: Offsets, row: int) -> str:
    """Key of a sample, for errors; its row and byte range if the tar is too damaged to read it."""
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
    """First array that is missing, unknown, or not as `Offsets` documents it, or None."""
    if missing := FIXED.keys() - arrays.keys():
        return f"has no {sorted(missing)[0]}"
    for name, array in arrays.items():
        if name not in FIXED and not _MEMBER.fullmatch(name):
            return f"holds {name[:80]!r}, which is no array of offsets"
        dtype, row_shape = FIXED.get(name, ("int64", (2,)))
        if array.dtype != dtype or array.ndim != 1 + len(row_shape) or array.shape[1:] != row_shape:
            wanted = (entry.samples, *row_shape)
            return f"{name} is {array.dtype} {array.shape}, wanted {dtype} {wanted}"
        if len(array) != entry.samples:
            return f"has {len(array)} samples, index.json says {entry.samples} in {entry.file}"
    return None


def _micro_conditioning(sample: Sample) -> list[int]:
    return [
        int(value) for name in MICRO_CONDITIONING for value in sample.metadata.get(name, (-1, -1))
    ]
