"""Features on their way to scores: one file for each batch of pictures, filled by any number of
processes, read in order.

A batch is the same pictures whoever makes it, so scores do not depend on the number of processes,
and a killed one loses the batch that it was working on.  About 16 KiB a picture and extractor,
until the scores are written.
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
from lpl_pretrain.evaluation.stats import FeatureStatistics


@dataclass(frozen=True)
class FeatureStore:
    folder: Path
    count: int
    """Pictures in all."""
    batch_size: int

    @property
    def batches(self) -> list[range]:
        return [
            range(first, min(first + self.batch_size, self.count))
            for first in range(0, self.count, self.batch_size)
        ]

    def missing(self, rank: int, world_size: int) -> list[range]:
        """Batches of this rank that are still to be made."""
        return [
            batch for batch in self.batches[rank::world_size] if not self._file(batch).is_file()
        ]

    def put(self, batch: range, tensors: dict[str, Tensor]) -> None:
        """Rows of one batch, by name.  Raises DataError for features that are not finite: they
        would make every score NaN.
        """
        for name, rows in tensors.items():
            bad = (~rows.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
            if bad:
                raise DataError(
                    f"{name} features of pictures {[batch[i] for i in bad[:8]]} are not finite: "
                    "the pictures, or the network"
                )
        save_tensors(self._file(batch), tensors)

    def rows(self, name: str, batches: list[range] | None = None) -> Iterator[Tensor]:
        """Batch by batch; a batch that holds no `name` is passed over.  Raises DataError for a
        damaged file.
        """
        for batch in self.batches if batches is None else batches:
            try:
                tensors, _ = load_tensors(self._file(batch), [name])
            except DataError as error:
                raise DataError(
                    f"{error}; remove this file, and the same command makes it again"
                ) from None
            yield from tensors.values()

    def whole(self, name: str) -> Tensor:
        return torch.cat(list(self.rows(name)))

    def first(self, name: str, count: int) -> Tensor:
        """At most so many rows."""
        batches = self.batches[: -(-count // self.batch_size)]
        return torch.cat(list(self.rows(name, batches)))[:count]

    def statistics(self, name: str, *, share: float = 1.0) -> FeatureStatistics:
        """Of the first `share` of the batches."""
        total: FeatureStatistics | None = None
        for rows in self.rows(name, self.batches[: max(1, round(share * len(self.batches)))]):
            total = total or FeatureStatistics(rows.shape[1])
            total.update(rows)
        assert total is not None, f"nothing is called {name}"
        return total

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, batch: range) -> Path:
        return self.folder / f"pictures_{batch.start:08d}.safetensors"
