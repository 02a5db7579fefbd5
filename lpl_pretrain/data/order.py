"""Order of training samples: sample index -> location, a pure function of (seed, fingerprints,
index), the same for any number of ranks and workers and after any restart.

A sample index counts samples over all ranks since the start of training.  Its location is computed
in closed form, in three steps: the bucket of its global batch (BucketSchedule), the folder that
provides the sample (Mixture), the shard and row in that folder (LaneOrder).  The samples of one
bucket in one folder form a pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from lpl_pretrain.config.data_mixture import DataFolders
from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.data.lanes import LaneOrder
from lpl_pretrain.data.mixture import BucketSchedule, Mixture


@dataclass(frozen=True, slots=True)
class Locations:
    """Locations of n stored samples; arrays (n,) int64."""

    folder: np.ndarray
    shard: np.ndarray
    row: np.ndarray

    @classmethod
    def empty_like(cls, sample_indices: np.ndarray) -> Locations:
        """Uninitialised locations, one for each sample index."""
        return cls(
            folder=np.empty_like(sample_indices),
            shard=np.empty_like(sample_indices),
            row=np.empty_like(sample_indices),
        )

    def tuples(self) -> list[tuple[int, int, int]]:
        """(folder, shard, row) of each sample."""
        return list(zip(self.folder.tolist(), self.shard.tolist(), self.row.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Pool:
    """The samples of one bucket in one folder."""

    folder: int
    shards: np.ndarray  # (S,) numbers in the folder's index
    order: LaneOrder


class SampleOrder:
    """Maps sample indices to locations."""

    def __init__(
        self,
        data: DataFolders,
        seed: int,
        global_batch_size: int,
        *,
        lanes: int,
        shuffle_block_samples: int,
    ) -> None:
        """`lanes`, `shuffle_block_samples`: how each pool is shuffled (data/lanes.py)."""
        name = data.merged.order_key
        self.shapes = [(bucket.height, bucket.width) for bucket in data.merged.buckets]
        self.pools: list[list[Pool]] = []  # by bucket
        self._mixtures: list[Mixture] = []
        bucket_samples: list[Fraction] = []
        for shape in self.shapes:
            pools = []
            weights = []
            for folder, (index, weight) in enumerate(zip(data.indexes, data.weights, strict=True)):
                shards = _shards_of_shape(index, shape)
                if not shards.size:
                    continue
                sizes = [index.shards[i].samples for i in shards]
                label = f"{index.order_key}/{shape[0]}x{shape[1]}"
                order = LaneOrder(
                    sizes, seed, label, lanes=lanes, shuffle_block_samples=shuffle_block_samples
                )
                pools.append(Pool(folder, shards, order))
                weights.append(weight * sum(sizes) / index.samples)
            self.pools.append(pools)
            self._mixtures.append(Mixture(weights, seed, f"{name}/{shape[0]}x{shape[1]}"))
            bucket_samples.append(sum(weights, Fraction(0)) * data.merged.samples)
        self._buckets = BucketSchedule(bucket_samples, global_batch_size, seed, name)

    def locate(self, sample_indices: ArrayLike) -> Locations:
        """Sample indices (n,) -> their locations."""
        indices = np.asarray(sample_indices, dtype=np.int64)
        assert indices.size == 0 or indices.min() >= 0, indices.min()
        locations = Locations.empty_like(indices)
        buckets, indices = self._buckets.assign(indices)
        for bucket in np.unique(buckets):
            in_bucket = np.flatnonzero(buckets == bucket)
            streams, stream_indices = self._mixtures[bucket].assign(indices[in_bucket])
            for stream in np.unique(streams):
                pool = self.pools[bucket][stream]
                in_stream = in_bucket[streams == stream]
                shards, rows = pool.order.locate(stream_indices[streams == stream])
                locations.folder[in_stream] = pool.folder
                locations.shard[in_stream] = pool.shards[shards]
                locations.row[in_stream] = rows
        return locations

    def concurrent_shards(self, folder: int) -> int:
        """Number of shards of a folder that are read side by side: one for each lane of each
        bucket, all shards of a pool without lanes.
        """
        pools = [pool for pools in self.pools for pool in pools if pool.folder == folder]
        return sum(
            len(pool.shards) if pool.order.is_whole else min(pool.order.lanes, len(pool.shards))
            for pool in pools
        )

    def substitute_location(self, location: tuple[int, int, int], key: int) -> tuple[int, int, int]:
        """Location of a sample of the same pool, selected by 64 random bits."""
        folder, shard, _ = location
        pool = next(
            pool
            for pools in self.pools
            for pool in pools
            if pool.folder == folder and (pool.shards == shard).any()
        )
        position = key % pool.order.samples
        ends = np.cumsum(pool.order.sizes)
        i = int(np.searchsorted(ends, position, side="right"))
        return folder, int(pool.shards[i]), int(position - ends[i] + pool.order.sizes[i])


def _shards_of_shape(index: DatasetIndex, shape: tuple[int, int]) -> np.ndarray:
    """Numbers (S,) of the shards whose latents have this (height, width)."""
    buckets = {
        number
        for number, bucket in enumerate(index.buckets)
        if (bucket.height, bucket.width) == shape
    }
    return np.array(
        [number for number, entry in enumerate(index.shards) if entry.bucket in buckets],
        dtype=np.int64,
    )
