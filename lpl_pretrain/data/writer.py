"""How latents become a finished folder: shards under a temporary name, renamed when whole; index.json last of all.

Without index.json a folder is not a data set, so whatever an interrupted encode left there is removed and made again.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lpl_pretrain.config.dataset import FORMAT_VERSION, INDEX_NAME, AutoencoderEntry, DatasetIndex, LatentEntry, ShardEntry
from lpl_pretrain.data.format import END_OF_ARCHIVE, pack_sample, shard_name
from lpl_pretrain.errors import DataError

PARTIAL_SUFFIX = ".partial"


class LatentStatistics:
    """Per-channel sums in float64 over samples and positions; sums, so that parts made apart can be added."""

    def __init__(self, channels: int) -> None:
        self.positions = 0
        self.mean, self.mean_square, self.variance = np.zeros((3, channels))

    def add(self, moments: np.ndarray) -> None:
        """(2C, H, W) as stored."""
        mean, std = np.split(moments.astype(np.float64), 2)
        self.positions += mean[0].size
        self.mean += mean.sum(axis=(1, 2))
        self.mean_square += np.square(mean).sum(axis=(1, 2))
        self.variance += np.square(std).sum(axis=(1, 2))

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Of a draw from the posterior: its variance is the variance of the means plus the mean of the variances."""
        mean = self.mean / self.positions
        return mean, np.sqrt(self.mean_square / self.positions - np.square(mean) + self.variance / self.positions)


class ShardWriter:
    """`add` every sample, then `finish`.  A shard is put together in memory and written at once."""

    def __init__(self, folder: Path, shard_max_bytes: int) -> None:
        if (folder / INDEX_NAME).exists():
            raise DataError(f"{folder}: holds a finished data set already: name another output, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in [*folder.glob("latents-*.tar"), *folder.glob(f"*{PARTIAL_SUFFIX}")]:
            leftover.unlink()
        self.folder = folder
        self.shard_max_bytes = shard_max_bytes
        self._shards: list[ShardEntry] = []
        self._blobs: list[bytes] = []  # of the shard in the making
        self._blob_bytes = 0
        self._labels: Counter[int | None] = Counter()
        self._statistics: LatentStatistics | None = None
        self._shape: tuple[int, ...] | None = None  # (2C, H, W)

    def add(self, key: str, moments: np.ndarray, label: int | None, caption: str | None, facts: dict[str, Any]) -> None:
        """`moments` float16 (2C, H, W), the same shape every time."""
        if self._statistics is None:
            self._shape, self._statistics = moments.shape, LatentStatistics(moments.shape[0] // 2)
        assert moments.shape == self._shape, (key, moments.shape, self._shape)
        blob = pack_sample(key, moments, label, caption, facts)
        if self._blobs and self._blob_bytes + len(blob) + len(END_OF_ARCHIVE) > self.shard_max_bytes:
            self._write_shard()
        self._blobs.append(blob)
        self._blob_bytes += len(blob)
        self._statistics.add(moments)
        self._labels[label] += 1

    def finish(
        self, autoencoder: AutoencoderEntry, resolution_px: int, classes: list[str], source_fingerprint: str
    ) -> DatasetIndex:
        """Publishes index.json and returns what it says."""
        assert self._blobs and self._statistics and self._shape, "no sample was added"
        self._write_shard()
        mean, std = self._statistics.mean_and_std()
        double_channels, height, width = self._shape
        index = DatasetIndex(
            format_version=FORMAT_VERSION,
            samples=sum(shard.samples for shard in self._shards),
            classes=classes,
            class_counts=[self._labels[label] for label in range(len(classes))],
            latent=LatentEntry(channels=double_channels // 2, height=height, width=width, mean=mean.tolist(), std=std.tolist()),
            autoencoder=autoencoder,
            resolution_px=resolution_px,
            source_fingerprint=source_fingerprint,
            fingerprint=fingerprint_of(self._shards),
            shards=self._shards,
        )
        self._publish(INDEX_NAME, [index.model_dump_json(indent=2).encode(), b"\n"])
        return index

    def _write_shard(self) -> None:
        name, pieces = shard_name(len(self._shards)), [*self._blobs, END_OF_ARCHIVE]
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        self._publish(name, pieces)
        self._shards.append(ShardEntry(file=name, samples=len(self._blobs), bytes=sum(map(len, pieces)), sha256=digest.hexdigest()))
        self._blobs, self._blob_bytes = [], 0

    def _publish(self, name: str, pieces: list[bytes]) -> None:
        partial = self.folder / (name + PARTIAL_SUFFIX)
        with open(partial, "wb") as file:
            file.writelines(pieces)
        os.replace(partial, self.folder / name)


def fingerprint_of(shards: list[ShardEntry]) -> str:
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()
