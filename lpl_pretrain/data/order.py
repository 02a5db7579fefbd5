"""Which sample comes n-th: a pure function of (seed, samples per epoch, n), the same for any ranks, workers and restarts.

n counts samples over all ranks since the start of training.  Epoch n // N is a permutation of its own, so a global batch
may span two epochs, and every sample is served exactly once in each.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from lpl_pretrain.runtime.rng import numpy_generator


class SampleOrder:
    def __init__(self, samples_per_epoch: int, seed: int) -> None:
        assert samples_per_epoch > 0, samples_per_epoch
        self.samples_per_epoch = samples_per_epoch
        self.seed = seed
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)  # a batch needs two epochs at most when N >= batch

    def dataset_index(self, sample_indices: ArrayLike) -> np.ndarray:
        """Global sample counts (any shape) -> int64 positions in the data set."""
        counts = np.asarray(sample_indices, dtype=np.int64)
        assert counts.size == 0 or counts.min() >= 0, counts.min()
        epochs, places = np.divmod(counts, self.samples_per_epoch)
        positions = np.empty_like(counts)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            positions[here] = self._permutation(int(epoch))[places[here]]
        return positions

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        """Sorted raw Philox words: numpy promises those across versions, and `Generator.permutation` not."""
        words = numpy_generator(self.seed, "sample_order", epoch).bit_generator.random_raw(self.samples_per_epoch)
        return np.argsort(words, kind="stable")
