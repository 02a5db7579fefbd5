"""How a part of the pictures becomes finished shards: files under a temporary name, renamed when whole, the part's record last.

A part is what one process encodes without asking anybody: it goes to shards of its own, whose bytes depend on the part alone.
So any number of processes write one folder, and a part without a record is simply done again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lpl_pretrain.config.dataset import ShardEntry
from lpl_pretrain.config.section import Section
from lpl_pretrain.data.format import NO_CLASS, Sample, shard_name
from lpl_pretrain.data.offsets import SUFFIX, ShardBytes
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.files import published

RECORDS = ".encode"
"""Folder of the parts' records, until index.json takes their place."""


class PartRecord(Section):
    """What index.json needs to know of one part."""

    samples: int
    skipped: list[str]
    """Why each picture was left out."""
    labels: dict[int, int]
    """Class id -> samples; NO_CLASS (-1) counts those without one."""
    class_names: dict[int, str]
    captions: int
    source: str
    """Sum modulo 2^256 of the sha256 of each picture's facts, in hexadecimal: it does not depend on how parts are cut."""
    statistics: dict[str, list[float]]
    shards: list[tuple[tuple[int, int], ShardEntry]]
    """((height, width) in latent positions, entry) of each."""


class LatentStatistics:
    """Per-channel sums in float64 over samples and positions; sums, so that parts made apart can be added."""

    def __init__(self, channels: int) -> None:
        self.positions = 0.0
        self.mean, self.mean_square, self.variance = np.zeros((3, channels))

    def add(self, moments: np.ndarray) -> None:
        """(2C, H, W), floating point."""
        mean, std = np.split(moments.astype(np.float64), 2)
        self.positions += mean[0].size
        self.mean += mean.sum(axis=(1, 2))
        self.mean_square += np.square(mean).sum(axis=(1, 2))
        self.variance += np.square(std).sum(axis=(1, 2))

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Of a draw from the posterior: its variance is the variance of the means plus the mean of the variances."""
        mean = self.mean / self.positions
        return mean, np.sqrt(self.mean_square / self.positions - np.square(mean) + self.variance / self.positions)

    def to_lists(self) -> dict[str, list[float]]:
        sums = {"mean": self.mean, "mean_square": self.mean_square, "variance": self.variance}
        return {"positions": [self.positions], **{name: values.tolist() for name, values in sums.items()}}

    @classmethod
    def total(cls, parts: Iterable[dict[str, list[float]]]) -> LatentStatistics:
        """In the order given: floating-point sums depend on it."""
        whole: LatentStatistics | None = None
        for part in parts:
            whole = whole or cls(len(part["mean"]))
            whole.positions += part["positions"][0]
            for name in ("mean", "mean_square", "variance"):
                setattr(whole, name, getattr(whole, name) + np.array(part[name]))
        assert whole is not None, "no part"
        return whole


class PartWriter:
    """`add` every sample of a part, then `finish`.  Shards are put together in memory, one for each bucket at a time."""

    def __init__(self, folder: Path, part: str, channels: int, shard_samples: int) -> None:
        self.folder, self.part, self.shard_samples = folder, part, shard_samples
        self.statistics = LatentStatistics(channels)
        self.labels: Counter[int] = Counter()
        self.captions = 0
        self._open: dict[tuple[int, int], ShardBytes] = {}  # bucket -> shard in the making
        self._shards: list[tuple[tuple[int, int], ShardEntry]] = []
        self._keys: set[str] = set()

    def add(self, sample: Sample, moments: np.ndarray) -> None:
        """`moments`: those of the sample as floating-point numbers, for the statistics."""
        if sample.key in self._keys:
            raise DataError(f"part {self.part}: key {sample.key!r} is there twice, wanted unique keys: rename one")
        self._keys.add(sample.key)
        bucket = moments.shape[1:]
        shard = self._open.setdefault(bucket, ShardBytes())
        shard.samples.append(sample)
        self.statistics.add(moments)
        self.labels[NO_CLASS if sample.label is None else sample.label] += 1
        self.captions += sample.caption is not None
        if len(shard) == self.shard_samples:
            self._write(bucket)

    def finish(self, *, skipped: list[str], class_names: dict[int, str], source: int) -> None:
        for bucket in sorted(self._open):
            self._write(bucket)
        record = PartRecord(
            samples=sum(self.labels.values()),
            skipped=skipped,
            labels=dict(sorted(self.labels.items())),
            class_names=dict(sorted(class_names.items())),
            captions=self.captions,
            source=f"{source:064x}",
            statistics=self.statistics.to_lists(),
            shards=self._shards,
        )
        publish(record_path(self.folder, self.part), [record.model_dump_json().encode()])

    def _write(self, bucket: tuple[int, int]) -> None:
        pieces, offsets = self._open.pop(bucket).finish()
        raw_offsets = offsets.to_bytes()
        name = shard_name(self.part, sum(other == bucket for other, _ in self._shards), f"{bucket[0]}x{bucket[1]}")
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        publish(self.folder / name, pieces)
        publish(offsets_path(self.folder / name), [raw_offsets])
        entry = ShardEntry(
            file=name,
            bucket=0,  # numbers are given when all buckets are known
            samples=len(offsets),
            bytes=sum(map(len, pieces)),
            sha256=digest.hexdigest(),
            offsets_sha256=hashlib.sha256(raw_offsets).hexdigest(),
        )
        self._shards.append((bucket, entry))


def record_path(folder: Path, part: str) -> Path:
    return folder / RECORDS / f"part-{part}.json"


def offsets_path(shard: Path) -> Path:
    return shard.with_suffix(SUFFIX)


def publish(path: Path, pieces: list[bytes]) -> None:
    """Raises DataError when there is no room; what was there before stays."""
    try:
        with published(path) as temporary, open(temporary, "wb") as file:
            file.writelines(pieces)
    except OSError as problem:
        size_mib = sum(map(len, pieces)) / 2**20
        raise DataError(
            f"{path}: {problem.strerror} while writing {size_mib:.1f} MiB: make room and run the same command again; "
            "finished parts are kept"
        ) from None
