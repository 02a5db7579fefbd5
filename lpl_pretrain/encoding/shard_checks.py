"""Compares the shards of a folder with its index: reads every byte and recomputes every count and
statistic of the index.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lpl_pretrain.config.dataset import DatasetIndex, ShardEntry
from lpl_pretrain.data.format import (
    CAPTION,
    FLIPPED,
    LABEL,
    METADATA,
    NO_CLASS,
    NUMPY_DTYPES,
    scan_shard,
)
from lpl_pretrain.data.offsets import SUFFIX
from lpl_pretrain.data.shard import OpenShard
from lpl_pretrain.encoding.latent_statistics import LatentStatistics
from lpl_pretrain.encoding.source_image import sample_digest
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.log import progress

STATISTICS_TOLERANCE = 1e-6
"""Fraction of the standard deviation; the sums in float64 may be in another order."""


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check: sound without problems."""

    name: str
    scope: str
    """Amount that was checked, such as a number of shards."""
    problems: list[str] = field(default_factory=list)


def check_shards(folder: Path, index: DatasetIndex) -> list[Check]:
    """Checks of all shards; a corrupt one is a problem, no error."""
    totals = _Totals(index)
    byte_problems: list[str] = []
    value_problems: list[str] = []
    with progress(index.samples, " samples", "verify") as bar:
        for entry in index.shards:
            try:
                shard = open_shard(folder, entry, index)
                byte_problems += [bad.reason for bad in shard.verify()]
                totals.add(shard)
                value_problems += _value_problems(shard, index, totals)
            except DataError as error:
                byte_problems.append(str(error))
            bar.update(entry.samples)
    counted = (
        f"{index.samples} samples, {len(index.classes)} classes, {index.captions} captions, "
        f"{len(index.buckets)} buckets"
    )
    total_mib = sum(entry.bytes for entry in index.shards) / 2**20
    return [
        Check("checksums", f"{len(index.shards)} shards, {total_mib:.1f} MiB", byte_problems),
        Check("shapes and finite values", f"{totals.arrays} arrays", value_problems),
        Check("counts", counted, totals.problems()),
        Check(
            "statistics",
            f"mean and std of {index.latent.channels} channels",
            totals.statistics_problems(),
        ),
    ]


def open_shard(folder: Path, entry: ShardEntry, index: DatasetIndex) -> OpenShard:
    """Opens a shard of a local folder.  Raises DataError."""
    path = folder / entry.file
    return OpenShard(path, path.with_suffix(SUFFIX), entry, index)


def moments_as_floats(shard: OpenShard, index: DatasetIndex, row: int, flipped: bool) -> np.ndarray:
    """Stored moments (2C, H, W) of one sample as float32."""
    bucket = index.buckets[shard.entry.bucket]
    stored = np.empty(
        (2 * index.latent.channels, bucket.height, bucket.width), NUMPY_DTYPES[index.moments_dtype]
    )
    shard.read_moments(row, flipped, memoryview(stored.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
    if index.moments_dtype == "fp16":
        return stored.astype(np.float32)
    return torch.from_numpy(stored.view("<i2")).view(torch.bfloat16).float().numpy()


class _Totals:
    """Totals over shards, added one by one so that only one shard is open at a time."""

    def __init__(self, index: DatasetIndex) -> None:
        self.index = index
        self.arrays = 0
        self.captions = 0
        self.source = 0
        self.labels: Counter[int] = Counter()
        self.bucket_samples: Counter[int] = Counter()
        self.key_hashes: list[np.ndarray] = []
        self.statistics = LatentStatistics(index.latent.channels)
        self.wrong_names: list[str] = []

    def add(self, shard: OpenShard) -> None:
        """Adds all samples of a shard."""
        self.labels.update(shard.offsets.label.tolist())
        self.bucket_samples[shard.entry.bucket] += len(shard.offsets)
        self.key_hashes.append(shard.offsets.key_hash)
        if (spans := shard.offsets.members.get(CAPTION)) is not None:
            self.captions += int((spans[:, 1] >= 0).sum())
        for key, label, caption, metadata in _read_texts(shard.path):
            class_name = metadata.get("class_name")
            self.source += sample_digest(
                key, metadata.get("image_sha256"), label, class_name, caption
            )
            if (
                class_name is not None
                and label is not None
                and self.index.classes[label : label + 1] != [class_name]
            ):
                self.wrong_names.append(
                    f"{shard.path}: sample {key!r} is of class {str(class_name)[:80]!r}, "
                    f"number {label}"
                )

    def problems(self) -> list[str]:
        """Counts of the index that differ from those of the shards."""
        index = self.index
        num_keys = len(np.unique(np.concatenate(self.key_hashes))) if self.key_hashes else 0
        compared = {
            "samples": (self.labels.total(), index.samples),
            "class counts": (
                [self.labels[c] for c in range(len(index.classes))],
                index.class_counts,
            ),
            "captions": (self.captions, index.captions),
            "bucket counts": (
                [self.bucket_samples[b] for b in range(len(index.buckets))],
                [bucket.samples for bucket in index.buckets],
            ),
            "different keys": (num_keys, index.samples),
            "source_fingerprint": (f"{self.source % 2**256:064x}", index.source_fingerprint),
        }
        lines = [
            f"{name}: {actual} in the shards, index.json says {recorded}"
            for name, (actual, recorded) in compared.items()
            if actual != recorded
        ]
        if self.wrong_names:
            lines.append(
                f"classes: index.json names them otherwise than {len(self.wrong_names)} samples: "
                f"{self.wrong_names[0]}"
            )
        return lines

    def statistics_problems(self) -> list[str]:
        """Statistics of the index that differ from those of the shards."""
        if not self.statistics.positions:
            return ["no latent could be read"]
        latent = self.index.latent
        mean, std = self.statistics.mean_and_std()
        return [
            f"latent.{name}: {actual.tolist()} in the shards, index.json says {recorded}"
            for name, actual, recorded in (("mean", mean, latent.mean), ("std", std, latent.std))
            if not np.all(np.abs(actual - np.array(recorded)) <= STATISTICS_TOLERANCE * std)
        ]


def _read_texts(path: Path) -> Iterator[tuple[str, int | None, str | None, dict[str, Any]]]:
    """(key, class id, caption, metadata) of each sample.  Raises DataError."""
    with open(path, "rb") as file:
        for key, members in scan_shard(path).items():
            texts = {}
            for extension in (LABEL, METADATA, CAPTION):
                if extension in members:
                    offset, size = members[extension]
                    file.seek(offset)
                    texts[extension] = file.read(size)
            try:
                label = int(texts[LABEL])
                metadata = json.loads(texts[METADATA])
                caption = texts[CAPTION].decode() if CAPTION in texts else None
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}: sample {key!r}: its texts cannot be read ({error}): encode the "
                    "folder again"
                ) from None
            if not isinstance(metadata, dict):
                raise DataError(
                    f"{path}: sample {key!r}: its .json is no mapping: encode the folder again"
                )
            yield key, None if label == NO_CLASS else label, caption, metadata


def _value_problems(shard: OpenShard, index: DatasetIndex, totals: _Totals) -> list[str]:
    """Members of the shard that are unreadable or not finite; adds the others to `totals`."""
    problems = []
    for row in range(len(shard.offsets)):
        try:
            for flipped in (False, True)[: 1 + index.flipped]:
                moments = moments_as_floats(shard, index, row, flipped)
                if not np.isfinite(moments).all():
                    problems.append(
                        f"{shard.where(row)}: NaN or infinity in its "
                        f"{FLIPPED if flipped else 'latent'}"
                    )
                elif not flipped:
                    totals.statistics.add(moments)
            shard.read_caption(row)
            for name, entry in index.text.items():
                shard.read_text(row, name, entry)
            totals.arrays += 1 + index.flipped + len(index.text)
        except DataError as error:
            problems.append(str(error))
    return problems
