"""Plan of an encode: divides the source into parts, the same ones for any number of processes and
on every start.

A part is a range of images of one unit: of a local tar, or of an image folder in random order; a
remote tar is one part.  Process r of n encodes parts r, r + n, r + 2n ..., without communication.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lpl_pretrain.config.base import OnError
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.data.offsets import key_hashes
from lpl_pretrain.encoding.classes import ClassTable
from lpl_pretrain.encoding.decode_image import PIXELS_VERSION
from lpl_pretrain.encoding.source_image import BadImage, SourceImage
from lpl_pretrain.encoding.sources import SourceUnit, list_units, no_images
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime import rng


@dataclass(frozen=True, slots=True)
class Part:
    """A range of images of one unit."""

    name: str
    """Contained in the names of its shards."""
    unit: SourceUnit
    first: int
    """Number of its first image in the unit."""
    samples: int | None
    """None: all images of a remote tar, whose number is not known yet."""
    start: int = 0
    """First byte of its first image in a local tar."""

    def images(self, fetch: Callable[[str], Path]) -> Iterator[SourceImage | BadImage]:
        """The images in order; `fetch` downloads a remote tar."""
        first = self.first if self.unit.files is not None else 0
        last = None if self.samples is None else first + self.samples
        return islice(self.unit.images(fetch, self.start), first, last)


@dataclass(frozen=True, slots=True)
class Plan:
    """Parts of an encode, and what is known about its source."""

    identity: str
    """Hash of everything that the encoded bytes depend on: the listing of the source, the encoders,
    the configuration.
    """
    parts: list[Part]
    earlier_identity: str = ""
    """Identity of the same inputs in versions before PIXELS_VERSION 2."""
    readable: int = 0
    """Images of local sources that have all their members."""
    captioned: int = 0
    """Readable images with a caption."""
    classes: list[str] | None = None
    """Names; None with remote tars."""

    @property
    def samples(self) -> int | None:
        """Number of images; None with remote tars."""
        counts = [part.samples for part in self.parts]
        return None if None in counts else sum(count for count in counts if count is not None)


def make_plan(config: EncodeConfig, encoders: dict[str, str]) -> Plan:
    """Plans an encode from the headers of the local sources.  `encoders`: name -> identity of each
    network.

    Raises DataError for repeated keys and contradicting classes, before anything is encoded; those
    of remote tars are detected afterwards (encoding/index.py).
    """
    identity = _PlanHash(config, encoders)
    classes = ClassTable()
    hashes: list[np.ndarray] = []
    parts: list[Part] = []
    readable = 0
    captioned = 0
    for number, unit in enumerate(list_units(config.source)):
        if unit.is_remote_tar:
            identity.update(f"{unit.origin.rpartition('/')[2]} {unit.size}\n")
            parts.append(Part(f"{number:05d}-0000", unit, 0, None))
            continue
        unit = _shuffled(unit, config.seed)
        keys: list[str] = []
        starts: list[int | None] = []
        for image in unit.images():
            if isinstance(image, BadImage):
                if config.on_error is OnError.STOP:
                    raise DataError(image.reason)
                keys.append(f"{unit.origin}\n{len(keys)}")  # unique: no key has a line break
                starts.append(None)
                continue
            identity.update(image.fingerprint() + "\n")
            readable += 1
            captioned += bool(image.caption and image.caption.strip())
            classes.add(f"{image.origin}: sample {image.key!r}", image.label, image.class_name)
            keys.append(image.key)
            starts.append(image.start)
        if not keys:
            raise no_images(unit.origin)
        hashes.append(key_hashes(keys))
        parts += _split(f"{number:05d}", unit, starts, config.shard_samples)
    names = classes.names()
    if hashes and (repeated := first_repeated(np.concatenate(hashes))) is not None:
        raise _repeated_key(config, repeated)
    is_local = all(part.samples is not None for part in parts)
    return Plan(
        identity=identity.hexdigest(),
        parts=parts,
        earlier_identity=identity.earlier_hexdigest(),
        readable=readable,
        captioned=captioned,
        classes=names if is_local else None,
    )


def content_settings(config: EncodeConfig) -> dict[str, Any]:
    """Settings that the encoded bytes depend on: all but paths (source and encoders are identified
    by content) and the policy for unreadable images.
    """
    return {**_configured(config), "pixels": PIXELS_VERSION}


class _PlanHash:
    """Hashes the configuration, the encoders and the listing of the source, as this version and as
    versions before PIXELS_VERSION 2.
    """

    def __init__(self, config: EncodeConfig, encoders: dict[str, str]) -> None:
        self._hash = hashlib.sha256()
        self._earlier_hash = hashlib.sha256()
        networks = sorted(encoders.items())
        self._hash.update(f"{json.dumps(content_settings(config))} {networks}\n".encode())
        self._earlier_hash.update(f"{json.dumps(_configured(config))} {networks}\n".encode())

    def update(self, text: str) -> None:
        self._hash.update(text.encode())
        self._earlier_hash.update(text.encode())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def earlier_hexdigest(self) -> str:
        return self._earlier_hash.hexdigest()


def _configured(config: EncodeConfig) -> dict[str, Any]:
    settings = config.model_dump(
        mode="json", exclude={"source", "output", "autoencoder", "on_error", "max_skipped_fraction"}
    )
    settings["text"] = {name: {**entry, "folder": ""} for name, entry in settings["text"].items()}
    return settings


def first_repeated(hashes: np.ndarray) -> int | None:
    """Smallest value that (N,) `hashes` has more than once."""
    ordered = np.sort(hashes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    return int(repeated[0]) if repeated.size else None


def _split(name: str, unit: SourceUnit, starts: list[int | None], shard_samples: int) -> list[Part]:
    """Parts of nearly the same size, each of at most one full shard per bucket.

    `starts`: first byte of each image; None for a bad one, at which no part begins.
    """
    num_images = len(starts)
    num_parts = -(-num_images // shard_samples)
    bounds = [num_images * i // num_parts for i in range(num_parts)] + [num_images]
    for i in range(1, num_parts):
        while bounds[i] < num_images and starts[bounds[i]] is None:
            bounds[i] += 1
    spans = [(first, end) for first, end in zip(bounds, bounds[1:], strict=False) if first < end]
    return [
        Part(f"{name}-{i:04d}", unit, first, end - first, starts[first] or 0)
        for i, (first, end) in enumerate(spans)
    ]


def _shuffled(unit: SourceUnit, seed: int) -> SourceUnit:
    """The unit with the images of a folder in random order: a folder lists class after class, and
    every shard should have all classes.
    """
    if unit.files is None:
        return unit
    shuffled = sorted(
        unit.files, key=lambda image: (rng.key(seed, f"shard_of/{image.key}"), image.origin)
    )
    return SourceUnit(unit.origin, tuple(shuffled), unit.size)


def _repeated_key(config: EncodeConfig, key_hash: int) -> DataError:
    """Error that names two images of this key hash; lists the source again."""
    images = [
        image
        for unit in list_units(config.source)
        if not unit.is_remote_tar
        for image in unit.images()
        if isinstance(image, SourceImage) and int(key_hashes([image.key])[0]) == key_hash
    ]
    return DataError(
        f"{images[-1].origin}: key {images[-1].key!r} is there twice over all sources (also "
        f"{images[0].origin}), wanted unique keys: rename one"
    )
