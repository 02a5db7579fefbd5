"""Exact mixing in closed form: which folder a sample comes from, which bucket a global batch
belongs to.

Both are computed for any index without iterating over the indices before it: opening a run at
sample 10^9 costs as much as opening it at the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from lpl_pretrain.config.dataset import MIX_CYCLE_SAMPLES
from lpl_pretrain.data.lanes import permutation


class Mixture:
    """Weighted mixture of streams: every cycle of MIX_CYCLE_SAMPLES holds the same number of
    samples of each stream, in random order.
    """

    def __init__(self, weights: Sequence[Fraction], seed: int, name: str) -> None:
        """`name` keys the random order."""
        self.quotas = quotas(weights)
        self.seed = seed
        self.name = name
        self._cycle = lru_cache(maxsize=4)(self._draw_cycle)

    def assign(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices (n,) in the mixture -> (stream, index in that stream), both (n,) int64."""
        if len(self.quotas) == 1:
            return np.zeros_like(indices), indices
        cycles, offsets = np.divmod(indices, MIX_CYCLE_SAMPLES)
        streams = np.empty_like(indices)
        stream_indices = np.empty_like(indices)
        for cycle in np.unique(cycles):
            in_cycle = cycles == cycle
            cycle_streams, occurrences = self._cycle(int(cycle))
            streams[in_cycle] = cycle_streams[offsets[in_cycle]]
            stream_indices[in_cycle] = (
                cycle * self.quotas[streams[in_cycle]] + occurrences[offsets[in_cycle]]
            )
        return streams, stream_indices

    def _draw_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """(stream of each position, earlier occurrences of that stream in the cycle)."""
        order = permutation(MIX_CYCLE_SAMPLES, self.seed, f"mixture/{self.name}", cycle)
        streams = np.repeat(np.arange(len(self.quotas)), self.quotas)[order]
        return streams, occurrence_index(streams)


class BucketSchedule:
    """Bucket of each global batch where buckets differ in latent shape: the same on all ranks, each
    bucket in proportion to its samples.

    Epoch e of bucket b ends with its batch number floor((e + 1) * samples_b / global_batch_size).
    Samples that do not fill a batch come first in the bucket's next epoch, so that over time every
    sample is read equally often.
    """

    def __init__(
        self, bucket_samples: Sequence[Fraction], global_batch_size: int, seed: int, name: str
    ) -> None:
        """`bucket_samples`: samples of each bucket in one epoch; fractional if folders are mixed by
        weight.  `name` keys the random order.
        """
        self.samples = list(bucket_samples)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.name = name
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def assign(self, sample_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample indices (n,) -> (bucket, index in that bucket), both (n,) int64."""
        if len(self.samples) == 1:
            return np.zeros_like(sample_indices), sample_indices
        steps, offsets = np.divmod(sample_indices, self.global_batch_size)
        buckets = np.empty_like(sample_indices)
        bucket_indices = np.empty_like(sample_indices)
        for step in np.unique(steps):
            in_step = steps == step
            bucket, batch = self.batch(int(step))
            buckets[in_step] = bucket
            bucket_indices[in_step] = batch * self.global_batch_size + offsets[in_step]
        return buckets, bucket_indices

    def batch(self, step: int) -> tuple[int, int]:
        """(bucket of global batch `step`, number of earlier batches of that bucket)."""
        epoch = int(step * self.global_batch_size // sum(self.samples))
        while sum(self._batches_before(epoch + 1)) <= step:
            epoch += 1
        batches_before = self._batches_before(epoch)
        buckets, occurrences = self._epoch(epoch)
        position = step - sum(batches_before)
        bucket = int(buckets[position])
        return bucket, batches_before[bucket] + int(occurrences[position])

    def _batches_before(self, epoch: int) -> list[int]:
        """Batches of each bucket in all epochs before `epoch`."""
        return [int(epoch * samples // self.global_batch_size) for samples in self.samples]

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(bucket of each batch, earlier occurrences of that bucket in the epoch)."""
        batches = np.subtract(self._batches_before(epoch + 1), self._batches_before(epoch))
        order = permutation(int(batches.sum()), self.seed, f"bucket_order/{self.name}", epoch)
        buckets = np.repeat(np.arange(len(batches)), batches)[order]
        return buckets, occurrence_index(buckets)


def quotas(weights: Sequence[Fraction]) -> np.ndarray:
    """Samples of each stream in a cycle: weights rounded to whole samples by largest remainder."""
    exact = [weight * MIX_CYCLE_SAMPLES / sum(weights) for weight in weights]
    rounded_down = np.array([int(quota) for quota in exact], dtype=np.int64)
    by_remainder = sorted(range(len(exact)), key=lambda i: (int(exact[i]) - exact[i], i))
    rounded_down[by_remainder[: MIX_CYCLE_SAMPLES - int(rounded_down.sum())]] += 1
    return rounded_down


def occurrence_index(kinds: np.ndarray) -> np.ndarray:
    """Number of equal elements before each element: [a, b, a, a] -> [0, 0, 1, 2]."""
    occurrences = np.empty_like(kinds)
    for kind in np.unique(kinds):
        of_kind = np.flatnonzero(kinds == kind)
        occurrences[of_kind] = np.arange(len(of_kind))
    return occurrences
