"""One shard, open for reading: any sample's members, at one read each, checked for what they claim
to be.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lpl_pretrain.config.dataset import DatasetIndex, ShardEntry, TextEntry
from lpl_pretrain.data.format import (
    CAPTION,
    DAMAGED,
    DTYPES,
    FLIPPED,
    MOMENTS,
    NO_CLASS,
    EncodedText,
    file_sha256,
    npy_header,
    scan_shard,
    text_members,
)
from lpl_pretrain.data.offsets import Offsets, key_at
from lpl_pretrain.errors import DataError


@dataclass(frozen=True, slots=True)
class Damage:
    row: int | None
    """None: the whole shard."""
    reason: str


class OpenShard:
    def __init__(
        self, path: Path, offsets_path: Path, entry: ShardEntry, index: DatasetIndex
    ) -> None:
        """Raises DataError for a file of the wrong size, offsets that are not the index's, class
        ids out of range.
        """
        self.path, self.entry = path, entry
        self._fd = -1
        check_size(path, entry)
        self.offsets = Offsets.read(offsets_path, entry)
        mirrored = self.offsets.members.get(FLIPPED)
        if index.flipped and (mirrored is None or (mirrored[:, 1] < 0).any()):
            raise DataError(
                f"{path}: has samples without {FLIPPED}, index.json says flipped: encode the "
                "folder again"
            )
        labels, classes = self.offsets.label, len(index.classes)
        wrong = np.flatnonzero((labels < (0 if classes else NO_CLASS)) | (labels >= classes))
        if wrong.size:
            raise DataError(
                f"{self.where(int(wrong[0]))}: class id {labels[wrong[0]]} is out of range, "
                f"index.json has {classes} classes: encode the folder again"
            )
        bucket = index.buckets[entry.bucket]
        self._header = npy_header(
            DTYPES[index.moments_dtype], (2 * index.latent.channels, bucket.height, bucket.width)
        )
        self._fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def where(self, row: int) -> str:
        return f"{self.path}: sample {key_at(self.path, self.offsets, row)!r}"

    def read_moments(self, row: int, flipped: bool, into: memoryview) -> None:
        """`into`: the bytes of one sample's moments.  Reads move no file position, so threads may
        share the file.
        """
        if flipped:
            offset, size = (int(value) for value in self.offsets.members[FLIPPED][row])
        else:
            offset, size = int(self.offsets.moments[row]), len(self._header) + len(into)
        header = bytearray(len(self._header))
        read = os.preadv(self._fd, [header, into], offset)
        if header != self._header or read != size:
            raise DataError(
                f"{self.where(row)}: {FLIPPED if flipped else MOMENTS} is not the array that "
                "index.json describes "
                f"({read} bytes, starts with {bytes(header[:100])!r}): {DAMAGED}"
            )

    def read_caption(self, row: int) -> str:
        """Empty when there is none."""
        raw = self._read_member(row, CAPTION)
        try:
            return "" if raw is None else raw.decode()
        except UnicodeDecodeError as problem:
            raise DataError(
                f"{self.where(row)}: .{CAPTION} is not UTF-8 ({problem}): {DAMAGED}"
            ) from None

    def read_text(self, row: int, name: str, entry: TextEntry) -> EncodedText:
        states, scale, pooled = text_members(name)
        dtype = np.dtype("i1" if entry.storage == "int8" else "<f2")
        tokens = self._read_array(row, states, dtype, entry.width)
        found = EncodedText(
            tokens,
            self._read_array(row, scale, np.dtype("<f2")) if entry.storage == "int8" else None,
            self._read_array(row, pooled, np.dtype("<f2")) if entry.pooled_width else None,
        )
        if problem := _text_problem(found, entry):
            raise DataError(f"{self.where(row)}: text {name} {problem}: {DAMAGED}")
        return found

    def verify(self) -> list[Damage]:
        """Reads every byte.  Empty when they are those that index.json means; else what is wrong,
        as closely as can be said.
        """
        if (found := file_sha256(self.path)) == self.entry.sha256:
            return []
        reason = f"{self.path}: sha256 is {found}, index.json says {self.entry.sha256}: {DAMAGED}"
        try:
            scan_shard(self.path)
        except DataError as problem:
            reason = str(problem)
        spans = zip(
            self.offsets.start.tolist(),
            self.offsets.end.tolist(),
            self.offsets.crc32.tolist(),
            strict=True,
        )
        rows = [
            row
            for row, (start, end, crc) in enumerate(spans)
            if zlib.crc32(os.pread(self._fd, end - start, start)) != crc
        ]
        return [
            Damage(row, f"sample {key_at(self.path, self.offsets, row)!r}, in {reason}")
            for row in rows
        ] or [Damage(None, reason)]

    def _read_member(self, row: int, extension: str) -> bytes | None:
        places = self.offsets.members.get(extension)
        if places is None or places[row, 1] < 0:
            return None
        offset, size = (int(value) for value in places[row])
        return os.pread(self._fd, size, offset)

    def _read_array(
        self, row: int, extension: str, dtype: np.dtype, width: int | None = None
    ) -> np.ndarray:
        """(n, width), or (n,): n follows from the member's size."""
        raw = self._read_member(row, extension)
        if raw is None:
            raise DataError(
                f"{self.where(row)}: has no {extension}, though index.json lists it: encode the "
                "folder again"
            )
        head = len(npy_header(dtype.str, (1, width) if width else (1,)))
        count = max(0, len(raw) - head) // (dtype.itemsize * (width or 1))
        shape = (count, width) if width else (count,)
        header = npy_header(dtype.str, shape)
        if not raw.startswith(header) or len(raw) != len(header) + dtype.itemsize * int(
            np.prod(shape)
        ):
            raise DataError(
                f"{self.where(row)}: {extension} is not a {dtype} array of width {width}: {DAMAGED}"
            )
        return np.frombuffer(raw, dtype, offset=len(header)).reshape(shape)


def _text_problem(text: EncodedText, entry: TextEntry) -> str | None:
    if not 0 < len(text.tokens) <= entry.max_tokens:
        return f"has {len(text.tokens)} tokens, wanted 1 to {entry.max_tokens}"
    if text.scale is not None and len(text.scale) != len(text.tokens):
        return f"has {len(text.scale)} scales for {len(text.tokens)} tokens"
    if text.pooled is not None and len(text.pooled) != entry.pooled_width:
        return f"has a pooled vector of {len(text.pooled)}, wanted {entry.pooled_width}"
    halves = [
        array
        for array in (text.tokens, text.scale, text.pooled)
        if array is not None and array.dtype == np.float16
    ]
    if any(((array.view("<i2") & 0x7FFF) >= 0x7C00).any() for array in halves):
        return "holds NaN or infinity"
    return None


def check_size(path: Path, entry: ShardEntry) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != entry.bytes:
        state = "missing" if found is None else f"has {found} bytes"
        raise DataError(
            f"{path}: {state}, index.json says {entry.bytes} bytes: copy it again, or encode the "
            "folder again"
        )
