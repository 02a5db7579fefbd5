"""What cannot be read, and what the configuration says to do about it: stop at the first, or go on
while it is little.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from lpl_pretrain.config.base import OnError
from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.schema import DataConfig
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.log import log


class BadSampleLog:
    """Damaged samples as (folder, shard, row); row None is the whole shard.  Threads may share it."""

    def __init__(self, config: DataConfig, indexes: list[DatasetIndex]) -> None:
        self.stops = config.on_error is OnError.STOP
        self.max_fraction = config.max_skipped_fraction
        self.found: dict[tuple[int, int, int | None], str] = {}
        self._indexes = indexes
        self._lock = threading.Lock()

    def reason(self, folder: int, shard: int, row: int | None) -> str | None:
        """Why this is known to be unreadable."""
        if not self.found:
            return None
        return self.found.get((folder, shard, None)) or self.found.get((folder, shard, row))

    def note(self, folder: int, shard: int, row: int | None, reason: str) -> None:
        """Raises DataError with this reason when the configuration says stop, or when it is too
        much by now.
        """
        if self.stops:
            raise DataError(reason)
        self.mark([(folder, shard, row, reason)])

    def mark(self, damaged: Iterable[Sequence]) -> None:
        """(folder, shard, row, reason) of what is not to be read again, as one rank told the
        others.
        """
        with self._lock:
            for folder, shard, row, reason in damaged:
                if self.reason(folder, shard, row) is None:
                    self.found[folder, shard, row] = reason
                    log.warning("skipped from now on: %s", reason)
            total = sum(index.samples for index in self._indexes)
            if (lost := self.lost_samples()) > self.max_fraction * total:
                raise DataError(
                    f"{lost} of {total} samples cannot be read, more than "
                    f"data.max_skipped_fraction={self.max_fraction}; "
                    f"the last: {next(reversed(self.found.values()))}"
                )

    def lost_samples(self) -> int:
        whole = {key[:2] for key in self.found if key[2] is None}
        single = sum(key[2] is not None and key[:2] not in whole for key in self.found)
        return single + sum(self._indexes[folder].shards[shard].samples for folder, shard in whole)
