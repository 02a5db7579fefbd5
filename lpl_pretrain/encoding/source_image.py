"""Records of the images that a source lists: `SourceImage` for a readable entry, `BadImage` for one
that is not.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import fsspec
import numpy as np

from lpl_pretrain.config.paths import is_url
from lpl_pretrain.encoding.decode_image import decode_image
from lpl_pretrain.errors import DataError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
FINGERPRINT_BYTES = 64
MAX_IMAGE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image of a source with its class and caption.  Its bytes are read on request, from any
    thread.
    """

    key: str
    origin: str
    """The file, or `tar:member`, for errors."""
    path: str
    """A local file or a URL."""
    offset: int
    size: int
    label: int | None = None
    class_name: str | None = None
    caption: str | None = None
    start: int = 0
    """First byte of its sample in a tar, where a reader can begin."""

    def read_bytes(self) -> bytes:
        """The encoded image.  Raises DataError."""
        if self.size > MAX_IMAGE_BYTES:
            raise DataError(
                f"{self.origin}: has {self.size} bytes, wanted at most {MAX_IMAGE_BYTES}: shrink "
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
        """uint8 (H_px, W_px, 3), upright, on white.  Raises DataError."""
        return decode_image(self.read_bytes(), self.origin)

    def sha256(self) -> str:
        """Digest of the encoded image."""
        return hashlib.sha256(self.read_bytes()).hexdigest()

    def fingerprint(self) -> str:
        """Text that changes with the key, class and caption and, as far as its size and last bytes
        tell, with the image.
        """
        tail = b""
        if not is_url(self.path):
            tail_start = self.offset + max(0, self.size - FINGERPRINT_BYTES)
            tail = self._read(tail_start, min(self.size, FINGERPRINT_BYTES))
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
        except Exception as error:  # drivers behind fsspec raise errors of their own
            raise DataError(
                f"{self.origin}: cannot be read ({error}): check the file, or run again"
            ) from None


def sample_digest(
    key: str,
    image_sha256: str | None,
    label: int | None,
    class_name: str | None,
    caption: str | None,
) -> int:
    """256-bit digest of what a sample was encoded from.

    `source_fingerprint` of index.json is their sum modulo 2^256, which depends neither on the order
    of the samples nor on the parts that they were encoded in.
    """
    text = json.dumps([key, image_sha256, label, class_name, caption])
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


@dataclass(frozen=True, slots=True)
class BadImage:
    """An entry of a source that cannot be read, listed where its image would be."""

    origin: str
    reason: str
    """Complete error message: location, value, wanted value, remedy."""
