"""One picture of a source, and what stands in the place of one whose source is damaged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import fsspec
import numpy as np

from lpl_pretrain.config.paths import is_url
from lpl_pretrain.encoding.images import decode_picture
from lpl_pretrain.errors import DataError

PICTURE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
STAMP_BYTES = 64
MAX_PICTURE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture and what its source says about it; its bytes are read when asked for, from any
    thread.
    """

    key: str
    origin: str
    """The file, or `tar:member`: what an error names."""
    path: str
    """A file of this machine, or a URL."""
    offset: int
    size: int
    label: int | None = None
    class_name: str | None = None
    caption: str | None = None
    start: int = 0
    """Of its sample in a tar, from where reading can begin."""

    def read_bytes(self) -> bytes:
        """Raises DataError."""
        if self.size > MAX_PICTURE_BYTES:
            raise DataError(
                f"{self.origin}: has {self.size} bytes, wanted at most {MAX_PICTURE_BYTES}: shrink "
                "or remove it"
            )
        encoded = self._read(self.offset, self.size)
        if len(encoded) != self.size:
            raise DataError(
                f"{self.origin}: read {len(encoded)} bytes, wanted {self.size}: the file changed "
                "meanwhile; run again"
            )
        return encoded

    def load(self) -> np.ndarray:
        """uint8 (H, W, 3), upright, on white.  Raises DataError."""
        return decode_picture(self.read_bytes(), self.origin)

    def sha256(self) -> str:
        return hashlib.sha256(self.read_bytes()).hexdigest()

    def stamp(self) -> str:
        """Changes with what the source says and, as far as size and last bytes tell, with the
        picture.
        """
        tail = (
            b""
            if is_url(self.path)
            else self._read(
                self.offset + max(0, self.size - STAMP_BYTES), min(self.size, STAMP_BYTES)
            )
        )
        return json.dumps(
            [self.key, self.size, tail.hex(), self.label, self.class_name, self.caption]
        )

    def _read(self, offset: int, size: int) -> bytes:
        try:
            with (
                fsspec.open(self.path, "rb") if is_url(self.path) else open(self.path, "rb") as file
            ):
                file.seek(offset)
                return file.read(size)
        except Exception as problem:  # drivers behind fsspec raise errors of their own
            raise DataError(
                f"{self.origin}: cannot be read ({problem}): check the file, or run again"
            ) from None


@dataclass(frozen=True, slots=True)
class Problem:
    """What stands in a picture's place when its source is damaged there."""

    origin: str
    reason: str
    """The whole sentence of an error: place, found, wanted, remedy."""
