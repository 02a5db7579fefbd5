"""Whether the fields of an `index.json` make sense together.

An index may come from anybody: no file name may lead out of its folder, and no number may ask for
absurd memory.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from lpl_pretrain.config.dataset_index import (
    MAX_CLASSES,
    DatasetIndex,
    fingerprint_of,
    shards_fingerprint_of,
)
from lpl_pretrain.config.strict_json import JSONError, parse_json

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.tar")
_ENCODER_NAME = re.compile(r"[a-z0-9_]{1,64}")
MAX_COUNT = 2**53
"""Largest number of samples or bytes: a float holds whole numbers up to it exactly."""
MAX_CHANNELS, MAX_SIDE, MAX_TOKENS, MAX_WIDTH, MAX_PX = 65_536, 65_536, 65_536, 1_048_576, 1_048_576
MAX_LATENT_BYTES = 2**31
"""Largest size of one sample's moments."""


def index_problems(index: DatasetIndex) -> list[str]:
    """Everything that does not fit, one line each; empty when all does."""
    problems = [
        *_counts(index),
        *_classes(index),
        *_latent(index),
        *_buckets(index),
        *_autoencoder(index),
        *_text(index),
        *_shards(index),
        *_config(index),
    ]
    return problems or [*_sums(index), *_fingerprints(index)]


def _in_range(name: str, value: int, least: int, most: int = MAX_COUNT) -> Iterator[str]:
    if not least <= value <= most:
        yield f"{name}={_short(value)}: wanted {least} to {most}"


def _finite(name: str, value: float, *, positive: bool = False) -> Iterator[str]:
    if not math.isfinite(value) or (positive and value <= 0):
        yield f"{name}={value}: wanted a finite number{' above 0' if positive else ''}"


def _hex(name: str, value: str) -> Iterator[str]:
    if not _SHA256.fullmatch(value):
        yield f"{name}={_short(value)}: wanted 64 hexadecimal digits"


def _counts(index: DatasetIndex) -> Iterator[str]:
    yield from _in_range("samples", index.samples, 1)
    yield from _in_range("skipped", index.skipped, 0)
    yield from _in_range("captions", index.captions, 0, index.samples)
    yield from _in_range("resolution_px", index.resolution_px, 1, MAX_PX)


def _classes(index: DatasetIndex) -> Iterator[str]:
    if len(index.classes) != len(index.class_counts):
        yield f"class_counts: {len(index.class_counts)} numbers for {len(index.classes)} classes"
    yield from _in_range("number of classes", len(index.classes), 0, MAX_CLASSES)
    for number, count in enumerate(index.class_counts):
        yield from _in_range(f"class_counts.{number}", count, 0)
    if index.classes and sum(index.class_counts) != index.samples:
        yield (
            f"class_counts: their sum is {sum(index.class_counts)}, wanted samples={index.samples}"
        )


def _latent(index: DatasetIndex) -> Iterator[str]:
    latent = index.latent
    yield from _in_range("latent.channels", latent.channels, 1, MAX_CHANNELS)
    for name, values in (("mean", latent.mean), ("std", latent.std)):
        if len(values) != latent.channels:
            yield f"latent.{name}: {len(values)} numbers for {_short(latent.channels)} channels"
        for number, value in enumerate(values):
            yield from _finite(f"latent.{name}.{number}", value, positive=name == "std")
    if (latent.height, latent.width) not in {
        (bucket.height, bucket.width) for bucket in index.buckets
    }:
        yield f"latent: {_short(latent.height)}x{_short(latent.width)} is not the shape of a bucket"


def _buckets(index: DatasetIndex) -> Iterator[str]:
    shapes = [(bucket.height, bucket.width) for bucket in index.buckets]
    if len(set(shapes)) < len(shapes):
        yield "buckets: a shape is there twice"
    side = max(1, index.autoencoder.downscale)
    for number, bucket in enumerate(index.buckets):
        name = f"buckets.{number}"
        yield from _in_range(f"{name}.samples", bucket.samples, 1)
        yield from _in_range(f"{name}.height", bucket.height, 1, MAX_SIDE)
        yield from _in_range(f"{name}.width", bucket.width, 1, MAX_SIDE)
        area = bucket.height * bucket.width
        if 4 * index.latent.channels * area > MAX_LATENT_BYTES:
            yield (
                f"{name}: a latent of {_short(area)} positions takes more than "
                f"{MAX_LATENT_BYTES} bytes"
            )
        if area * side**2 > index.resolution_px**2:
            yield (
                f"{name}: {_short(bucket.height)}x{_short(bucket.width)} positions of "
                f"{_short(side)} px are more than the square of "
                f"resolution_px={_short(index.resolution_px)}"
            )


def _autoencoder(index: DatasetIndex) -> Iterator[str]:
    entry = index.autoencoder
    yield from _in_range("autoencoder.downscale", entry.downscale, 1, MAX_PX)
    yield from _finite("autoencoder.shift", entry.shift)
    yield from _finite("autoencoder.scale", entry.scale, positive=True)
    if not entry.identity:
        yield "autoencoder.identity: empty"


def _text(index: DatasetIndex) -> Iterator[str]:
    for name, entry in index.text.items():
        if not _ENCODER_NAME.fullmatch(name):
            yield f"text.{_short(name)}: a name has 1 to 64 characters of a-z, 0-9 and _"
            continue
        yield from _in_range(f"text.{name}.width", entry.width, 1, MAX_WIDTH)
        yield from _in_range(f"text.{name}.max_tokens", entry.max_tokens, 1, MAX_TOKENS)
        if entry.pooled_width is not None:
            yield from _in_range(f"text.{name}.pooled_width", entry.pooled_width, 1, MAX_WIDTH)
    if index.format_version >= 3 and index.null_text.keys() != index.text.keys():
        yield (
            f"null_text: is of {_short(sorted(index.null_text))}, wanted "
            f"{_short(sorted(index.text))}, as text has"
        )
    for name, file in index.null_text.items():
        yield from _in_range(f"null_text.{name}.bytes", file.bytes, 1)
        yield from _hex(f"null_text.{name}.sha256", file.sha256)


def _shards(index: DatasetIndex) -> Iterator[str]:
    if not index.shards:
        yield "shards: there is none"
    if len({entry.file for entry in index.shards}) < len(index.shards):
        yield "shards: a file is there twice"
    for number, entry in enumerate(index.shards):
        name = f"shards.{number}"
        if not _SHARD_FILE.fullmatch(entry.file):
            yield f"{name}.file={_short(entry.file)}: wanted a plain file name that ends in .tar"
        yield from _in_range(f"{name}.bucket", entry.bucket, 0, len(index.buckets) - 1)
        yield from _in_range(f"{name}.samples", entry.samples, 1)
        yield from _in_range(f"{name}.bytes", entry.bytes, 1)
        yield from _hex(f"{name}.sha256", entry.sha256)
        yield from _hex(f"{name}.offsets_sha256", entry.offsets_sha256)


def _config(index: DatasetIndex) -> Iterator[str]:
    try:
        if not isinstance(parse_json(index.config.encode(), "config"), dict):
            yield "config: wanted a mapping in JSON"
    except JSONError as problem:
        yield str(problem)


def _sums(index: DatasetIndex) -> Iterator[str]:
    shards = sum(entry.samples for entry in index.shards)
    if shards != index.samples:
        yield f"samples: index.json says {index.samples} samples, its shards {shards}"
    per_bucket: Counter[int] = Counter()
    for entry in index.shards:
        per_bucket[entry.bucket] += entry.samples
    for number, bucket in enumerate(index.buckets):
        if per_bucket[number] != bucket.samples:
            yield f"buckets.{number}.samples={bucket.samples}: its shards have {per_bucket[number]}"


def _fingerprints(index: DatasetIndex) -> Iterator[str]:
    yield from _hex("source_fingerprint", index.source_fingerprint)
    shards = shards_fingerprint_of(index.shards)
    if index.order_key != shards:
        yield f"fingerprint of the shards is {_short(index.order_key)}, theirs is {shards}"
    elif index.fingerprint not in (shards, fingerprint_of(index)):
        yield (
            f"fingerprint is {_short(index.fingerprint)}, that of its fields is "
            f"{fingerprint_of(index)}"
        )


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
