"""Shares of streams, exactly: which folder gives a sample, which bucket a global batch is of, in
closed form.

Both answer for any count without looking at those before it, so that opening a run at sample 10^9
costs what the first costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from lpl_pretrain.config.dataset import MIX_CYCLE_SAMPLES
from lpl_pretrain.data.lanes import permutation


class Mixture:
    """Samples of several streams by weight: every cycle of MIX_CYCLE_SAMPLES holds the same number
    of each, shuffled.
    """

    def __init__(self, weights: Sequence[Fraction], seed: int, name: str) -> None:
        self.quotas = quotas(weights)
        self.seed, self.name = seed, name
        self._cycle = lru_cache(maxsize=4)(self._draw_cycle)

    def assign(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Counts (n,) -> (stream, count in that stream), both (n,) int64."""
        if len(self.quotas) == 1:
            return np.zeros_like(counts), counts
        cycles, places = np.divmod(counts, MIX_CYCLE_SAMPLES)
        streams, inside = np.empty_like(counts), np.empty_like(counts)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            stream_at, turn_at = self._cycle(int(cycle))
            streams[here] = stream_at[places[here]]
            inside[here] = cycle * self.quotas[streams[here]] + turn_at[places[here]]
        return streams, inside

    def _draw_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(MIX_CYCLE_SAMPLES, self.seed, f"mixture/{self.name}", cycle)
        streams = np.repeat(np.arange(len(self.quotas)), self.quotas)[order]
        return streams, turns(streams)


class BucketSchedule:
    """The bucket of each global batch, when buckets differ in shape: all ranks alike, every bucket
    by its share.

    Epoch e of bucket b ends with its batch number floor((e + 1) * samples_b / global_batch_size):
    what does not fill a batch is served at the start of its next epoch, so that over time every
    sample is served equally often.
    """

    def __init__(
        self, bucket_samples: Sequence[Fraction], global_batch_size: int, seed: int, name: str
    ) -> None:
        """`bucket_samples`: samples of each bucket in one epoch; fractions, when folders are mixed
        by weight.
        """
        self.samples, self.global_batch_size = list(bucket_samples), global_batch_size
        self.seed, self.name = seed, name
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def assign(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Counts (n,) -> (bucket, count in that bucket), both (n,) int64."""
        if len(self.samples) == 1:
            return np.zeros_like(counts), counts
        steps, places = np.divmod(counts, self.global_batch_size)
        buckets, inside = np.empty_like(counts), np.empty_like(counts)
        for step in np.unique(steps):
            here = steps == step
            bucket, batch = self.batch(int(step))
            buckets[here], inside[here] = bucket, batch * self.global_batch_size + places[here]
        return buckets, inside

    def batch(self, step: int) -> tuple[int, int]:
        """(bucket, number of the batch among that bucket's) of global batch `step`."""
        epoch = int(step * self.global_batch_size // sum(self.samples))
        while sum(self._done(epoch + 1)) <= step:
            epoch += 1
        done = self._done(epoch)
        buckets, turns_of = self._epoch(epoch)
        place = step - sum(done)
        bucket = int(buckets[place])
        return bucket, done[bucket] + int(turns_of[place])

    def _done(self, epochs: int) -> list[int]:
        """Batches of each bucket in the first so many epochs."""
        return [int(epochs * samples // self.global_batch_size) for samples in self.samples]

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        batches = np.subtract(self._done(epoch + 1), self._done(epoch))
        order = permutation(int(batches.sum()), self.seed, f"bucket_order/{self.name}", epoch)
        buckets = np.repeat(np.arange(len(batches)), batches)[order]
        return buckets, turns(buckets)


def quotas(weights: Sequence[Fraction]) -> np.ndarray:
    """Samples of each stream in a cycle: weights to the nearest whole samples, by largest
    remainder.
    """
    exact = [weight * MIX_CYCLE_SAMPLES / sum(weights) for weight in weights]
    whole = np.array([int(share) for share in exact], dtype=np.int64)
    remainders = sorted(range(len(exact)), key=lambda i: (int(exact[i]) - exact[i], i))
    whole[remainders[: MIX_CYCLE_SAMPLES - int(whole.sum())]] += 1
    return whole


def turns(kinds: np.ndarray) -> np.ndarray:
    """For each element, how many equal ones stand before it."""
    result = np.empty_like(kinds)
    for kind in np.unique(kinds):
        mine = np.flatnonzero(kinds == kind)
        result[mine] = np.arange(len(mine))
    return result
