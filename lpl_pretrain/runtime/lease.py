"""One worker for one piece of work, on a file system that several nodes share, whatever kills the worker.

A lease is a file that appears whole, by a hard link, and so to one worker only.  Its holder touches it now and then.  One that was
not touched for `STALE_S`, or whose process on this host is gone, or that this very job held before it was requeued, belongs to
nobody and is taken over, by a rename, and so by one worker only.  Times are compared on the file system's own clock.

Nobody can know that a worker is dead on a node that does not answer: one that was cut off, or suspended, and is succeeded, finds
out when it touches the lease, or asks, and is told by `on_loss`.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lpl_pretrain.runtime.files import naming, remove_leftovers, temporary_name

STALE_S = 120.0
TOUCH_S = 15.0


class Lease:
    """`with Lease(path) as lease: if lease.held: ...`; nothing is waited for."""

    def __init__(
        self,
        path: Path,
        *,
        job: str = "",
        on_loss: Callable[[], None] = lambda: None,
        stale_s: float = STALE_S,
        touch_s: float = TOUCH_S,
    ) -> None:
        """`job`: of a scheduler, which runs it once at a time.  `on_loss` may be called by a thread."""
        self.path, self.job, self.on_loss, self.stale_s, self.touch_s = path, job, on_loss, stale_s, touch_s
        self.token = secrets.token_hex(8)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """By this worker, as far as the file tells."""
        return self._thread is not None and read_lease(self.path).get("token") == self.token

    def check(self) -> None:
        """`on_loss` if it is this worker's no more: asked before writing what would be in an heir's way."""
        if not self.held:
            self.on_loss()

    def take(self) -> bool:
        """Now, or not at all; once taken it stays so until this context is left."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path.parent)
        if self._thread is None and (self._take() or (self._clear_stale() and self._take())):
            self._thread = threading.Thread(target=self._keep_touching, daemon=True)
            self._thread.start()
        return self._thread is not None

    def __enter__(self) -> Lease:
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            if self.held:
                self.path.unlink()
            self._thread = None

    def _take(self) -> bool:
        mine = temporary_name(self.path)
        holder = {"token": self.token, "job": self.job, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        try:
            with naming(mine):
                mine.write_text(json.dumps(holder))
            os.link(mine, self.path)
        except FileExistsError:
            return False
        finally:
            mine.unlink(missing_ok=True)
        return True

    def _clear_stale(self) -> bool:
        """True when the lease was nobody's and is out of the way."""
        holder = read_lease(self.path)
        if not (is_stale(self.path, self.stale_s) or self._is_dead(holder)):
            return not self.path.exists()
        seen, aside = holder.get("token"), temporary_name(self.path)
        with suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if read_lease(aside).get("token") != seen:  # another worker had taken it over in the meantime: back with it
                with suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()
        return not self.path.exists()

    def _is_dead(self, holder: dict) -> bool:
        if self.job and holder.get("job") == self.job:
            return True
        return (
            holder.get("host") == socket.gethostname()
            and not Path(f"/proc/{holder['pid']}").exists()
            and Path("/proc/self").exists()
        )

    def _keep_touching(self) -> None:
        while not self._over.wait(self.touch_s):
            with suppress(OSError):  # of a file system that may come back
                self.check()
                if self.held:
                    os.utime(self.path)


def is_stale(path: Path, stale_s: float = STALE_S) -> bool:
    """False for a lease that is not there."""
    try:
        touched = path.stat().st_mtime
    except FileNotFoundError:
        return False
    return _now(path.parent) - touched > stale_s


def read_lease(path: Path) -> dict:
    """Who holds it; {} when nobody does."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _now(folder: Path) -> float:
    """By the clock of the file system, which is not this machine's."""
    probe = temporary_name(folder / "now")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()
