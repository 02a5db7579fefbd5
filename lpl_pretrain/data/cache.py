"""Where the files of a data folder lie on this machine: as they are, or copies of a remote folder's
in a cache of limited size.

The cache is named by content (sha256), shared by all processes of a machine, and holds nothing that
cannot be fetched again.
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

FETCH_THREADS = 4


class Store(Protocol):
    def path(self, file: str, sha256: str, size: int) -> Path:
        """Where the file lies; for a remote folder, once it is here."""
        ...

    def ahead(self, file: str, sha256: str, size: int) -> None:
        """It will be asked for soon."""
        ...

    def close(self) -> None: ...


class LocalStore:
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def path(self, file: str, sha256: str, size: int) -> Path:
        return self.folder / file

    def ahead(self, file: str, sha256: str, size: int) -> None:
        pass

    def close(self) -> None:
        pass


class CachedStore:
    """Threads and processes may ask for the same file: one fetches it, the others wait."""

    def __init__(self, url: str, config: CacheConfig, *, largest_bytes: int, at_once: int) -> None:
        """`at_once` files of up to `largest_bytes` are read side by side.  Raises ConfigError when
        they do not fit.
        """
        self.url, self.config = url.rstrip("/"), config
        self.max_bytes = int(config.max_gib * 2**30)
        self.folder = expand(config.folder)
        wanted_gib = 2 * at_once * largest_bytes / 2**30
        if wanted_gib > config.max_gib:
            raise ConfigError(
                f"data.cache.max_gib={config.max_gib}: {at_once} shards of up to "
                f"{largest_bytes / 2**30:.3g} GiB are read "
                "side by side, and the next ones fetched meanwhile: wanted at least "
                f"{wanted_gib:.3g}, or fewer lanes"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")
        self._asked: dict[str, Future[Path]] = {}

    def path(self, file: str, sha256: str, size: int) -> Path:
        path = self.folder / f"{sha256}{''.join(Path(file).suffixes[-2:])}"
        with FileLock(self.folder / f".{sha256}.lock"):
            if path.exists():
                os.utime(path)  # the time of its last use
                return path
            self._make_room(size)
            return download(f"{self.url}/{file}", path, sha256, self.config.retries)

    def ahead(self, file: str, sha256: str, size: int) -> None:
        if file not in self._asked or self._asked[file].done():
            self._asked[file] = self._pool.submit(
                self.path, file, sha256, size
            )  # an error shows when the file is needed

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _make_room(self, size: int) -> None:
        """What a process has open stays readable for it after it is removed here."""
        with FileLock(self.folder / ".room.lock"):
            found = []
            for path in self.folder.iterdir():
                if not path.name.startswith("."):
                    stat = path.stat()
                    found.append((stat.st_mtime_ns, stat.st_size, path))
            total = sum(size for _, size, _ in found) + size
            for _, freed, path in sorted(found):
                if total <= self.max_bytes:
                    return
                path.unlink(missing_ok=True)
                total -= freed
