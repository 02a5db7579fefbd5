"""Is a folder what its index says?  Every byte of its shards is read, and everything the index
counts is counted again.
"""

from __future__ import annotations

import hashlib
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
from lpl_pretrain.encoding.writer import LatentStatistics
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.log import progress

STATISTICS_TOLERANCE = 1e-6
"""Of the standard deviation: sums in float64, in another order."""


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    looked_at: str
    problems: list[str] = field(default_factory=list)


def check_shards(folder: Path, index: DatasetIndex) -> list[Check]:
    tally, bytes_wrong, values_wrong = _Tally(index), list[str](), list[str]()
    with progress(index.samples, " samples", "verify") as bar:
        for entry in index.shards:
            try:
                shard = open_shard(folder, entry, index)
                bytes_wrong += [damage.reason for damage in shard.verify()]
                tally.add(shard)
                values_wrong += _wrong_values(shard, index, tally)
            except DataError as problem:
                bytes_wrong.append(str(problem))
            bar.update(entry.samples)
    counted = (
        f"{index.samples} samples, {len(index.classes)} classes, {index.captions} captions, "
        f"{len(index.buckets)} buckets"
    )
    total_mib = sum(entry.bytes for entry in index.shards) / 2**20
    return [
        Check("checksums", f"{len(index.shards)} shards, {total_mib:.1f} MiB", bytes_wrong),
        Check("shapes and finite values", f"{tally.arrays} arrays", values_wrong),
        Check("counts", counted, tally.problems()),
        Check(
            "statistics",
            f"mean and std of {index.latent.channels} channels",
            tally.statistics_problems(),
        ),
    ]


def open_shard(folder: Path, entry: ShardEntry, index: DatasetIndex) -> OpenShard:
    path = folder / entry.file
    return OpenShard(path, path.with_suffix(SUFFIX), entry, index)


def moments_as_floats(shard: OpenShard, index: DatasetIndex, row: int, flipped: bool) -> np.ndarray:
    """(2C, H, W) float32"""
    bucket = index.buckets[shard.entry.bucket]
    stored = np.empty(
        (2 * index.latent.channels, bucket.height, bucket.width), NUMPY_DTYPES[index.moments_dtype]
    )
    shard.read_moments(row, flipped, memoryview(stored.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
    if index.moments_dtype == "fp16":
        return stored.astype(np.float32)
    return torch.from_numpy(stored.view("<i2")).view(torch.bfloat16).float().numpy()


class _Tally:
    """What shards hold, added up one by one: no more than one of them is open."""

    def __init__(self, index: DatasetIndex) -> None:
        self.index = index
        self.arrays = self.captions = self.source = 0
        self.labels: Counter[int] = Counter()
        self.per_bucket: Counter[int] = Counter()
        self.key_hashes: list[np.ndarray] = []
        self.statistics = LatentStatistics(index.latent.channels)
        self.wrong_names: list[str] = []

    def add(self, shard: OpenShard) -> None:
        self.labels.update(shard.offsets.label.tolist())
        self.per_bucket[shard.entry.bucket] += len(shard.offsets)
        self.key_hashes.append(shard.offsets.key_hash)
        if (places := shard.offsets.members.get(CAPTION)) is not None:
            self.captions += int((places[:, 1] >= 0).sum())
        for key, label, caption, facts in _read_facts(shard.path):
            class_name = facts.get("class_name")
            entry = json.dumps([key, facts.get("image_sha256"), label, class_name, caption])
            self.source += int.from_bytes(hashlib.sha256(entry.encode()).digest(), "big")
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
        index, different = (
            self.index,
            len(np.unique(np.concatenate(self.key_hashes))) if self.key_hashes else 0,
        )
        found = {
            "samples": (self.labels.total(), index.samples),
            "class counts": (
                [self.labels[c] for c in range(len(index.classes))],
                index.class_counts,
            ),
            "captions": (self.captions, index.captions),
            "bucket counts": (
                [self.per_bucket[b] for b in range(len(index.buckets))],
                [bucket.samples for bucket in index.buckets],
            ),
            "different keys": (different, index.samples),
            "source_fingerprint": (f"{self.source % 2**256:064x}", index.source_fingerprint),
        }
        lines = [
            f"{what}: {there} in the shards, index.json says {said}"
            for what, (there, said) in found.items()
            if there != said
        ]
        if self.wrong_names:
            lines.append(
                f"classes: index.json names them otherwise than {len(self.wrong_names)} samples: "
                f"{self.wrong_names[0]}"
            )
        return lines

    def statistics_problems(self) -> list[str]:
        if not self.statistics.positions:
            return ["no latent could be read"]
        latent = self.index.latent
        mean, std = self.statistics.mean_and_std()
        return [
            f"latent.{name}: {found.tolist()} in the shards, index.json says {said}"
            for name, found, said in (("mean", mean, latent.mean), ("std", std, latent.std))
            if not np.all(np.abs(found - np.array(said)) <= STATISTICS_TOLERANCE * std)
        ]


def _read_facts(path: Path) -> Iterator[tuple[str, int | None, str | None, dict[str, Any]]]:
    """(key, class id, caption, facts) of each sample.  Raises DataError."""
    with open(path, "rb") as file:
        for key, members in scan_shard(path).items():
            texts = {}
            for extension in (LABEL, METADATA, CAPTION):
                if extension in members:
                    offset, size = members[extension]
                    file.seek(offset)
                    texts[extension] = file.read(size)
            try:
                label, facts = int(texts[LABEL]), json.loads(texts[METADATA])
                caption = texts[CAPTION].decode() if CAPTION in texts else None
            except (ValueError, RecursionError) as problem:
                raise DataError(
                    f"{path}: sample {key!r}: its texts cannot be read ({problem}): encode the "
                    "folder again"
                ) from None
            if not isinstance(facts, dict):
                raise DataError(
                    f"{path}: sample {key!r}: its .json is no mapping: encode the folder again"
                )
            yield key, None if label == NO_CLASS else label, caption, facts


def _wrong_values(shard: OpenShard, index: DatasetIndex, tally: _Tally) -> list[str]:
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
                    tally.statistics.add(moments)
            shard.read_caption(row)
            for name, entry in index.text.items():
                shard.read_text(row, name, entry)
            tally.arrays += 1 + index.flipped + len(index.text)
        except DataError as problem:
            problems.append(str(problem))
    return problems
