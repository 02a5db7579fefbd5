"""Latents by global sample count: any batch, at any point of training, without state.

The trainer decides who asks for which counts; the stream knows neither ranks nor steps, so resuming is asking for the
next counts.  Sizes of all shards are checked when it opens; a shard's headers are walked when it is first touched.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from lpl_pretrain.config.dataset import ShardEntry, read_index
from lpl_pretrain.data.ahead import map_ahead
from lpl_pretrain.data.batch import LatentBatch
from lpl_pretrain.data.format import NO_CLASS, ShardLayout, file_sha256, parse_moments, scan_shard
from lpl_pretrain.data.order import SampleOrder
from lpl_pretrain.errors import DataError

BATCHES_AHEAD = 4


class LatentStream:
    """A finished folder, opened for reading.  Raises DataError that names shard and key."""

    def __init__(self, folder: str | Path, seed: int) -> None:
        self.folder = Path(folder)
        self.index = read_index(folder)
        self.order = SampleOrder(self.index.samples, seed)
        self._check_sizes()
        self._ends = np.cumsum([entry.samples for entry in self.index.shards])
        self._shards: dict[int, _Shard] = {}

    def close(self) -> None:
        while self._shards:
            self._shards.popitem()[1].close()

    def read(self, sample_indices: Sequence[int]) -> LatentBatch:
        """One row per global sample count, in the order given."""
        positions = self.order.dataset_index(sample_indices)
        shape = self._shape()
        half, labels = np.empty((len(positions), *shape), dtype=np.float16), np.empty(len(positions), dtype=np.int64)
        places: list[tuple[_Shard, int]] = []
        for row, position in enumerate(positions):
            number = int(np.searchsorted(self._ends, position, side="right"))
            shard, place = self._shard(number), int(position - self._ends[number])  # counted from the shard's end: negative
            half[row] = shard.read(place, shape)
            labels[row] = shard.layout.labels[place]
            places.append((shard, place))
        moments = torch.from_numpy(half).float()
        if not torch.isfinite(moments).all():
            shard, place = places[int((~torch.isfinite(moments)).flatten(1).any(1).nonzero()[0])]
            raise _not_finite(shard, place)
        return LatentBatch(moments, torch.from_numpy(labels), torch.as_tensor(np.asarray(sample_indices, dtype=np.int64)))

    def prefetch(self, requests: Iterable[Sequence[int]]) -> Generator[LatentBatch, None, None]:
        """`read` of each request, ahead of the consumer on one thread; pinned when there is CUDA.

        `requests` is consumed a few batches early; closing the iterator joins the thread.
        """
        pin = torch.cuda.is_available()
        return map_ahead(
            lambda request: self.read(request).pin_memory() if pin else self.read(request), requests, threads=1, ahead=BATCHES_AHEAD
        )

    def verify(self, *, share: int = 0, shares: int = 1) -> None:
        """Reads every byte of every `shares`-th shard: shapes and finite values of all samples, then the checksum."""
        shape = self._shape()
        for number in range(share, len(self.index.shards), shares):
            entry, shard = self.index.shards[number], self._shard(number)
            for place in range(entry.samples):
                if not np.isfinite(shard.read(place, shape)).all():
                    raise _not_finite(shard, place)
            if (found := file_sha256(self.folder / entry.file)) != entry.sha256:
                raise DataError(
                    f"{self.folder / entry.file}: sha256 is {found}, index.json says {entry.sha256}: "
                    "copy the file again, or encode the folder again"
                )

    def _shape(self) -> tuple[int, int, int]:
        latent = self.index.latent
        return 2 * latent.channels, latent.height, latent.width

    def _check_sizes(self) -> None:
        for entry in self.index.shards:
            path = self.folder / entry.file
            found = path.stat().st_size if path.is_file() else None
            if found != entry.bytes:
                state = "missing" if found is None else f"has {found} bytes"
                raise DataError(f"{path}: {state}, index.json says {entry.bytes} bytes: copy it again, or encode the folder again")
        if (total := sum(entry.samples for entry in self.index.shards)) != self.index.samples or total == 0:
            raise DataError(f"{self.folder}: index.json says {self.index.samples} samples, its shards {total}: encode it again")

    def _shard(self, number: int) -> _Shard:
        if number not in self._shards:
            entry = self.index.shards[number]
            self._shards[number] = _Shard(self.folder / entry.file, entry, len(self.index.classes))
        return self._shards[number]


class _Shard:
    """One open file and where its samples lie."""

    def __init__(self, path: Path, entry: ShardEntry, classes: int) -> None:
        self.path = path
        self.layout: ShardLayout = scan_shard(path)
        if len(self.layout.keys) != entry.samples:
            raise DataError(f"{path}: {len(self.layout.keys)} samples, index.json says {entry.samples}: encode the folder again")
        lowest = 0 if classes else NO_CLASS
        wrong = np.flatnonzero((self.layout.labels < lowest) | (self.layout.labels >= classes))
        if wrong.size:
            raise DataError(
                f"{self.where(wrong[0])}: class id {self.layout.labels[wrong[0]]} is out of range, "
                f"index.json has {classes} classes: encode the folder again"
            )
        self._fd = os.open(path, os.O_RDONLY)

    def where(self, place: int) -> str:
        return f"{self.path}: sample {self.layout.keys[place]!r}"

    def read(self, place: int, shape: tuple[int, int, int]) -> np.ndarray:
        """A float16 view; pread moves no file position, so threads may share the file."""
        blob = os.pread(self._fd, int(self.layout.sizes[place]), int(self.layout.offsets[place]))
        return parse_moments(blob, shape, self.where(place))

    def close(self) -> None:
        os.close(self._fd)


def _not_finite(shard: _Shard, place: int) -> DataError:
    return DataError(f"{shard.where(place)}: NaN or infinity in its latent, wanted finite values: encode the folder again")
