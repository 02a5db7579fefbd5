"""Reader of one shard: any member of any sample with one read, checked against index.json."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np

from lpl_pretrain.config.dataset import REMEDY, DatasetIndex, ShardEntry, TextEntry
from lpl_pretrain.config.hashing import file_sha256
from lpl_pretrain.data.bad_samples import BadSample
from lpl_pretrain.data.format import (
    CAPTION,
    FLIPPED,
    MOMENTS,
    NO_CLASS,
    NUMPY_DTYPES,
    CaptionEmbedding,
    npy_header,
    scan_shard,
    text_members,
)
from lpl_pretrain.data.offsets import Offsets, key_at
from lpl_pretrain.errors import DataError


class OpenShard:
    """An open tar with its offsets.  Reads move no file position, so threads may share it."""

    def __init__(
        self, path: Path, offsets_path: Path, entry: ShardEntry, index: DatasetIndex
    ) -> None:
        """Raises DataError for a file of the wrong size, offsets that do not match the index, class
        ids out of range.
        """
        self.path = path
        self.entry = entry
        self._fd = -1
        check_size(path, entry)
        self.offsets = Offsets.read(offsets_path, entry)
        mirrored = self.offsets.members.get(FLIPPED)
        if index.flipped and (mirrored is None or (mirrored[:, 1] < 0).any()):
            raise DataError(
                f"{path}: has samples without {FLIPPED}, index.json says flipped: encode the "
                "folder again"
            )
        labels = self.offsets.label
        classes = len(index.classes)
        wrong = np.flatnonzero((labels < (0 if classes else NO_CLASS)) | (labels >= classes))
        if wrong.size:
            raise DataError(
                f"{self.where(int(wrong[0]))}: class id {labels[wrong[0]]} is out of range, "
                f"index.json has {classes} classes: encode the folder again"
            )
        bucket = index.buckets[entry.bucket]
        self._header = npy_header(
            NUMPY_DTYPES[index.moments_dtype],
            (2 * index.latent.channels, bucket.height, bucket.width),
        )
        self._fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def where(self, row: int) -> str:
        """Name of a sample for errors."""
        return f"{self.path}: sample {key_at(self.path, self.offsets, row)!r}"

    def read_moments(self, row: int, flipped: bool, buffer: memoryview) -> None:
        """Reads one sample's moments, as stored, to `buffer`, which has exactly their size.

        Raises DataError if the member is not the array that index.json describes.
        """
        if flipped:
            offset, size = self.offsets.members[FLIPPED][row].tolist()
        else:
            offset = int(self.offsets.moments[row])
            size = len(self._header) + len(buffer)
        header = bytearray(len(self._header))
        read = os.preadv(self._fd, [header, buffer], offset)
        if header != self._header or read != size:
            raise DataError(
                f"{self.where(row)}: {FLIPPED if flipped else MOMENTS} is not the array that "
                f"index.json describes ({read} bytes, starts with {bytes(header[:100])!r}): "
                f"{REMEDY}"
            )

    def read_caption(self, row: int) -> str:
        """Caption of a sample; "" if it has none."""
        raw = self._read_member(row, CAPTION)
        try:
            return "" if raw is None else raw.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.where(row)}: .{CAPTION} is not UTF-8 ({error}): {REMEDY}"
            ) from None

    def read_text(self, row: int, name: str, entry: TextEntry) -> CaptionEmbedding:
        """Embedding of a sample's caption by encoder `name`, which `entry` describes."""
        tokens, scale, pooled = text_members(name)
        half = np.dtype("<f2")
        is_int8 = entry.storage == "int8"
        embedding = CaptionEmbedding(
            self._read_array(row, tokens, np.dtype("i1") if is_int8 else half, entry.width),
            self._read_array(row, scale, half) if is_int8 else None,
            self._read_array(row, pooled, half) if entry.pooled_width else None,
        )
        if problem := _text_problem(embedding, entry):
            raise DataError(f"{self.where(row)}: text {name} {problem}: {REMEDY}")
        return embedding

    def verify(self) -> list[BadSample]:
        """Reads every byte and compares checksums.  Returns the corrupt samples, or one record for
        the whole shard if the corruption is outside of them; nothing if the shard is intact.
        """
        if (actual := file_sha256(self.path)) == self.entry.sha256:
            return []
        reason = f"{self.path}: sha256 is {actual}, index.json says {self.entry.sha256}: {REMEDY}"
        try:
            scan_shard(self.path)
        except DataError as error:
            reason = str(error)
        spans = zip(
            self.offsets.start.tolist(),
            self.offsets.end.tolist(),
            self.offsets.crc32.tolist(),
            strict=True,
        )
        bad_rows = [
            row
            for row, (start, end, crc) in enumerate(spans)
            if zlib.crc32(os.pread(self._fd, end - start, start)) != crc
        ]
        if not bad_rows:
            return [BadSample(None, reason)]
        return [
            BadSample(row, f"sample {key_at(self.path, self.offsets, row)!r}, in {reason}")
            for row in bad_rows
        ]

    def _read_member(self, row: int, extension: str) -> bytes | None:
        """Content of a member; None if the sample has none with this extension."""
        spans = self.offsets.members.get(extension)
        if spans is None or spans[row, 1] < 0:
            return None
        offset, size = spans[row].tolist()
        return os.pread(self._fd, size, offset)

    def _read_array(
        self, row: int, extension: str, dtype: np.dtype, width: int | None = None
    ) -> np.ndarray:
        """(n, width) array, or (n,) without `width`; n follows from the member's size."""
        raw = self._read_member(row, extension)
        if raw is None:
            raise DataError(
                f"{self.where(row)}: has no {extension}, though index.json lists it: encode the "
                "folder again"
            )
        # n changes the digits in a .npy header, but not its padded length
        header_bytes = len(npy_header(dtype.str, (1, width) if width else (1,)))
        n = max(0, len(raw) - header_bytes) // (dtype.itemsize * (width or 1))
        shape = (n, width) if width else (n,)
        header = npy_header(dtype.str, shape)
        wanted_bytes = len(header) + dtype.itemsize * int(np.prod(shape))
        if not raw.startswith(header) or len(raw) != wanted_bytes:
            raise DataError(
                f"{self.where(row)}: {extension} is not a {dtype} array of width {width}: {REMEDY}"
            )
        return np.frombuffer(raw, dtype, offset=len(header)).reshape(shape)


def _text_problem(embedding: CaptionEmbedding, entry: TextEntry) -> str | None:
    """First mismatch of an embedding with the encoder's entry in index.json, or None."""
    num_tokens = len(embedding.tokens)
    if not 0 < num_tokens <= entry.max_tokens:
        return f"has {num_tokens} tokens, wanted 1 to {entry.max_tokens}"
    if embedding.scale is not None and len(embedding.scale) != num_tokens:
        return f"has {len(embedding.scale)} scales for {num_tokens} tokens"
    if embedding.pooled is not None and len(embedding.pooled) != entry.pooled_width:
        return f"has a pooled vector of {len(embedding.pooled)}, wanted {entry.pooled_width}"
    halves = [
        array
        for array in (embedding.tokens, embedding.scale, embedding.pooled)
        if array is not None and array.dtype == np.float16
    ]
    if any(((array.view("<i2") & 0x7FFF) >= 0x7C00).any() for array in halves):
        return "holds NaN or infinity"
    return None


def check_size(path: Path, entry: ShardEntry) -> None:
    """Raises DataError unless the file exists and has the size that index.json records."""
    size = path.stat().st_size if path.is_file() else None
    if size != entry.bytes:
        state = "missing" if size is None else f"has {size} bytes"
        raise DataError(
            f"{path}: {state}, index.json says {entry.bytes} bytes: copy it again, or encode the "
            "folder again"
        )
