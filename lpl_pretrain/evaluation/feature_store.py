"""Features between generation and scoring: one file a batch of images, read back in order.

Any number of processes fill a store.  A batch is the same images whichever process computes it, so
scores do not depend on the number of processes, and a killed process loses no more than the batch
that it was working on.  A store takes about 16 KiB for each image and extractor until the scores
are written.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lpl_pretrain.errors import DataError
from lpl_pretrain.evaluation.checksummed_tensors import load_tensors, save_tensors
from lpl_pretrain.evaluation.feature_checks import MAX_NAMED_ROWS, nonfinite_rows
from lpl_pretrain.evaluation.stats import FeatureStatistics


@dataclass(frozen=True)
class FeatureStore:
    """A folder of features of `count` images, in batches of `batch_size`."""

    folder: Path
    count: int
    """Number of images in all batches."""
    batch_size: int

    @property
    def batches(self) -> list[range]:
        """Image indices of each batch."""
        return [
            range(first, min(first + self.batch_size, self.count))
            for first in range(0, self.count, self.batch_size)
        ]

    def missing(self, rank: int, world_size: int) -> list[range]:
        """Batches of this rank that have no file yet."""
        return [
            batch for batch in self.batches[rank::world_size] if not self._file(batch).is_file()
        ]

    def put(self, batch: range, tensors: dict[str, Tensor]) -> None:
        """Write the rows of one batch, by name.

        Raises DataError for features that are not finite: they would make every score NaN.
        """
        for name, rows in tensors.items():
            if bad := nonfinite_rows(rows):
                raise DataError(
                    f"{name} features of images {[batch[i] for i in bad[:MAX_NAMED_ROWS]]} are not "
                    "finite: the images, or the extractor's outputs, contain NaN or infinity"
                )
        save_tensors(self._file(batch), tensors)

    def rows(self, name: str, batches: list[range] | None = None) -> Iterator[Tensor]:
        """Yield the rows of each batch that has a tensor `name`; None: of all batches.

        Raises DataError for a damaged file.
        """
        for batch in self.batches if batches is None else batches:
            try:
                tensors, _ = load_tensors(self._file(batch), [name])
            except DataError as error:
                raise DataError(
                    f"{error}; remove this file, and the same command computes it again"
                ) from None
            yield from tensors.values()

    def read_all(self, name: str) -> Tensor:
        """All rows, (count, ...)."""
        return torch.cat(list(self.rows(name)))

    def read_first(self, name: str, count: int) -> Tensor:
        """The first `count` rows, or all where there are fewer."""
        batches = self.batches[: -(-count // self.batch_size)]
        return torch.cat(list(self.rows(name, batches)))[:count]

    def statistics(self, name: str, *, fraction: float = 1.0) -> FeatureStatistics:
        """Mean and covariance over the first `fraction` of the batches."""
        batches = self.batches[: max(1, round(fraction * len(self.batches)))]
        total: FeatureStatistics | None = None
        for rows in self.rows(name, batches):
            total = total or FeatureStatistics(rows.shape[1])
            total.update(rows)
        assert total is not None, f"{self.folder}: no tensor {name}"
        return total

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, batch: range) -> Path:
        return self.folder / f"pictures_{batch.start:08d}.safetensors"
