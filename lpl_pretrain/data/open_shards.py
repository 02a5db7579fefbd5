"""Open shards of data folders: opened on request, limited in number, downloaded ahead if remote."""

from __future__ import annotations

import threading

import numpy as np

from lpl_pretrain.config.data_mixture import DataFolders
from lpl_pretrain.config.dataset import ShardEntry
from lpl_pretrain.config.paths import is_url
from lpl_pretrain.config.schema import DataConfig
from lpl_pretrain.data.bad_samples import BadSampleLog
from lpl_pretrain.data.cache import CachedStore, LocalStore, Store
from lpl_pretrain.data.offsets import SUFFIX
from lpl_pretrain.data.order import SampleOrder
from lpl_pretrain.data.shard import OpenShard, check_size
from lpl_pretrain.errors import DataError

MAX_OPEN_SHARDS = 768
"""Below the usual limit of 1,024 open files."""


class OpenShards:
    """Shards of several folders by (folder, shard).  Threads may share it."""

    def __init__(
        self,
        config: DataConfig,
        folders: DataFolders,
        order: SampleOrder,
        bad_samples: BadSampleLog,
    ) -> None:
        """Logs local shards of the wrong size to `bad_samples`."""
        self.config = config
        self.folders = folders
        self.order = order
        self.bad_samples = bad_samples
        concurrent = [order.concurrent_shards(i) for i in range(len(folders.paths))]
        self.max_open = min(2 * sum(concurrent), MAX_OPEN_SHARDS)
        self._stores = [self._store(path, i, concurrent[i]) for i, path in enumerate(folders.paths)]
        self._open: dict[tuple[int, int], OpenShard] = {}
        self._lock = threading.Lock()
        self._prefetched_to = 0
        self._check_sizes()

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """Cancels downloads that have not begun, waits for the others, closes all shards."""
        for store in self._stores:
            store.close()
        with self._lock:
            self._open.clear()

    def get(self, folder: int, shard: int) -> OpenShard:
        """The shard, opened unless it is open.  Raises DataError if it cannot be opened, and logs
        it as bad.
        """
        if already_open := self._open.get((folder, shard)):
            return already_open
        index = self.folders.indexes[folder]
        entry = index.shards[shard]
        try:
            tar_path, offsets_path = (self._stores[folder].path(*file) for file in _files(entry))
            opened = OpenShard(tar_path, offsets_path, entry, index)
        except DataError as error:
            self.bad_samples.add(folder, shard, None, str(error))
            raise
        with self._lock:
            self._open[folder, shard] = opened
            if len(self._open) > self.max_open:
                # the shard opened first; its file is closed when the last reader drops it
                del self._open[next(iter(self._open))]
        return opened

    def prefetch(self, sample_indices: np.ndarray) -> None:
        """Starts to download the remote shards that are read before every lane has advanced by one
        block from `sample_indices`.
        """
        if not any(isinstance(store, CachedStore) for store in self._stores):
            return
        lanes = self.config.lanes
        horizon = lanes * self.config.shuffle_block_samples
        newest = int(sample_indices.max(initial=0))
        if newest + horizon * 3 // 4 < self._prefetched_to:
            return
        self._prefetched_to = newest + horizon
        distances = np.arange(0, horizon + 1, max(1, horizon // 4))
        upcoming = self.order.locate((newest + distances[:, None] + np.arange(lanes)).ravel())
        shards = zip(upcoming.folder.tolist(), upcoming.shard.tolist(), strict=True)
        for folder, shard in dict.fromkeys(shards):
            for file in _files(self.folders.indexes[folder].shards[shard]):
                self._stores[folder].prefetch(*file)

    def _store(self, path: str, folder: int, concurrent_shards: int) -> Store:
        if not is_url(path):
            return LocalStore(path)
        largest = max(entry.bytes for entry in self.folders.indexes[folder].shards)
        return CachedStore(
            path,
            self.config.cache,
            max_file_bytes=largest,
            concurrent_files=concurrent_shards,
        )

    def _check_sizes(self) -> None:
        for folder, (store, index) in enumerate(
            zip(self._stores, self.folders.indexes, strict=True)
        ):
            if not isinstance(store, LocalStore):
                continue
            for shard, entry in enumerate(index.shards):
                try:
                    check_size(store.folder / entry.file, entry)
                except DataError as error:
                    self.bad_samples.add(folder, shard, None, str(error))


def _files(entry: ShardEntry) -> list[tuple[str, str, int]]:
    """(file, sha256, bytes) of a shard and of its offsets."""
    offsets = entry.file.removesuffix(".tar") + SUFFIX
    return [(entry.file, entry.sha256, entry.bytes), (offsets, entry.offsets_sha256, 0)]
