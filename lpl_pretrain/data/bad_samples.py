"""Log of unreadable samples, with the policy for them: stop at the first one, or skip them up to a
fraction of the data (`data.on_error`, `data.max_skipped_fraction`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lpl_pretrain.config.base import OnError
from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.schema import DataConfig
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.log import log


@dataclass(frozen=True, slots=True)
class BadSample:
    """Corruption of one sample, or of a whole shard, that `OpenShard.verify` has detected."""

    row: int | None
    """None: the whole shard."""
    reason: str


class BadSampleLog:
    """Reasons by (folder, shard, row); row None: the whole shard.  Threads may share it."""

    def __init__(self, config: DataConfig, indexes: list[DatasetIndex]) -> None:
        self.stop_on_error = config.on_error is OnError.STOP
        self.max_fraction = config.max_skipped_fraction
        self.reasons: dict[tuple[int, int, int | None], str] = {}
        self._indexes = indexes
        self._lock = threading.Lock()

    def reason(self, folder: int, shard: int, row: int | None) -> str | None:
        """Reason of a logged sample; None if it is not logged."""
        if not self.reasons:
            return None
        return self.reasons.get((folder, shard, None)) or self.reasons.get((folder, shard, row))

    def add(self, folder: int, shard: int, row: int | None, reason: str) -> None:
        """Logs one unreadable sample.

        Raises DataError with `reason` if the policy is to stop, or if too many samples are
        unreadable.
        """
        if self.stop_on_error:
            raise DataError(reason)
        self.extend([(folder, shard, row, reason)])

    def extend(self, bad_samples: Iterable[Sequence]) -> None:
        """Logs (folder, shard, row, reason) records, such as those that another rank broadcast.

        Raises DataError if more than `max_fraction` of all samples are unreadable.
        """
        with self._lock:
            for folder, shard, row, reason in bad_samples:
                if self.reason(folder, shard, row) is None:
                    self.reasons[folder, shard, row] = reason
                    log.warning("skipped from now on: %s", reason)
            num_bad = self.num_samples()
            total = sum(index.samples for index in self._indexes)
            if num_bad > self.max_fraction * total:
                raise DataError(
                    f"{num_bad} of {total} samples cannot be read, more than "
                    f"data.max_skipped_fraction={self.max_fraction}; the last: "
                    f"{next(reversed(self.reasons.values()))}"
                )

    def num_samples(self) -> int:
        """Number of unreadable samples; a bad shard counts with all of its samples."""
        bad_shards = {(folder, shard) for folder, shard, row in self.reasons if row is None}
        single_rows = sum(
            row is not None and (folder, shard) not in bad_shards
            for folder, shard, row in self.reasons
        )
        return single_rows + sum(
            self._indexes[folder].shards[shard].samples for folder, shard in bad_shards
        )
