"""Local paths of a data folder's files: the files themselves, or copies of a remote folder's files
in a cache of limited size.

Cached files are named by content (sha256).  All processes of a machine share the cache, and
everything in it can be downloaded again.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from lpl_pretrain.config.paths import expand
from lpl_pretrain.config.schema import CacheConfig
from lpl_pretrain.data.remote import download
from lpl_pretrain.errors import ConfigError

DOWNLOAD_THREADS = 4


class Store(Protocol):
    """Files of one data folder, by name, digest and size in bytes."""

    def path(self, file: str, sha256: str, size: int) -> Path:
        """Local path of the file; waits for the download of a remote one."""
        ...

    def prefetch(self, file: str, sha256: str, size: int) -> None:
        """Starts to download the file in the background."""
        ...

    def close(self) -> None:
        """Cancels downloads that have not begun and waits for the others."""
        ...


class LocalStore:
    """Files of a folder on this machine."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def path(self, file: str, sha256: str, size: int) -> Path:
        return self.folder / file

    def prefetch(self, file: str, sha256: str, size: int) -> None:
        pass

    def close(self) -> None:
        pass


class CachedStore:
    """Files of a remote folder, downloaded when they are needed.

    Threads and processes may request the same file: one of them downloads it, the others wait.
    """

    def __init__(
        self, url: str, config: CacheConfig, *, max_file_bytes: int, concurrent_files: int
    ) -> None:
        """Raises ConfigError if the cache cannot hold twice `concurrent_files` files of
        `max_file_bytes`: those that are read side by side, and those that come next.
        """
        self.url = url.rstrip("/")
        self.config = config
        self.max_bytes = int(config.max_gib * 2**30)
        self.folder = expand(config.folder)
        needed_gib = 2 * concurrent_files * max_file_bytes / 2**30
        if needed_gib > config.max_gib:
            raise ConfigError(
                f"data.cache.max_gib={config.max_gib}: {concurrent_files} shards of up to "
                f"{max_file_bytes / 2**30:.3g} GiB are read side by side, and the next ones "
                f"downloaded meanwhile: wanted at least {needed_gib:.3g}, or fewer lanes"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(DOWNLOAD_THREADS, thread_name_prefix="download")
        self._requested: dict[str, Future[Path]] = {}

    def path(self, file: str, sha256: str, size: int) -> Path:
        path = self.folder / f"{sha256}{''.join(Path(file).suffixes[-2:])}"
        with FileLock(self.folder / f".{sha256}.lock"):
            if path.exists():
                os.utime(path)  # the time of its last use
                return path
            self._evict(size)
            return download(f"{self.url}/{file}", path, sha256, self.config.retries)

    def prefetch(self, file: str, sha256: str, size: int) -> None:
        if file not in self._requested or self._requested[file].done():
            # an error is raised by `path`, when the file is needed
            self._requested[file] = self._pool.submit(self.path, file, sha256, size)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _evict(self, new_bytes: int) -> None:
        """Removes the least recently used files until `new_bytes` more fit.  Processes that have a
        removed file open can read it on.
        """
        with FileLock(self.folder / ".evict.lock"):
            by_last_use = []
            for path in self.folder.iterdir():
                if not path.name.startswith("."):
                    stat = path.stat()
                    by_last_use.append((stat.st_mtime_ns, stat.st_size, path))
            total = sum(size for _, size, _ in by_last_use) + new_bytes
            for _, size, path in sorted(by_last_use):
                if total <= self.max_bytes:
                    return
                path.unlink(missing_ok=True)
                total -= size
