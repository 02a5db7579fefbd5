"""One worker for one piece of work, on a file system that several nodes share, whatever kills the
worker.

A lease is a file that appears whole, by a hard link, and so to one worker only.  Its holder touches
it now and then.  One that was not touched for `STALE_S`, or whose process on this host is gone, or
that this very job held before it was requeued, belongs to nobody and is taken over, by a rename,
and so by one worker only.  Times are compared on the file system's own clock.

A file that does not hold what a worker writes (empty, cut, edited, a link or a pipe) belongs to
nobody at once, because a lease appears whole; so does one that was touched far in the future.  One
that cannot be read (no permission, an I/O error) is left alone until it is stale.

Nobody can know that a worker is dead on a node that does not answer: one that was cut off, or
suspended, and is succeeded, finds out when it touches the lease, or asks, and is told by `on_loss`.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lpl_pretrain.config.strict_json import JSONError, is_count, parse_json
from lpl_pretrain.errors import CheckpointError, SaveError, is_transient
from lpl_pretrain.runtime.atomic import naming, remove_leftovers, temporary_name
from lpl_pretrain.runtime.preempt import Interrupted, leaves_traces, uninterrupted

STALE_S = 120.0
TOUCH_S = 15.0
MOST_BYTES = 1 << 16


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
        """`job`: of a scheduler, which runs it once at a time.  `on_loss` may be called by a
        thread.
        """
        self.path, self.job, self.on_loss, self.stale_s, self.touch_s = (
            path,
            job,
            on_loss,
            stale_s,
            touch_s,
        )
        self.token = secrets.token_hex(8)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """By this worker, as far as the file tells."""
        return self._thread is not None and (_read(self.path) or {}).get("token") == self.token

    def check(self) -> None:
        """`on_loss` if it is this worker's no more: asked before writing what would be in an heir's
        way.

        Raises SaveError once it was released, for what still saves in the background while an error
        ends the training.
        """
        if self._over.is_set():
            raise SaveError(
                f"{self.path}: was released, for training has ended: nothing is saved any more"
            )
        if not self.held:
            self.on_loss()

    def other_holder(self) -> dict:
        """Who holds it so that it cannot be taken now; {} when nobody does."""
        holder = read_lease(self.path)
        return (
            {}
            if not holder or is_stale(self.path, self.stale_s) or self._is_dead(holder)
            else holder
        )

    def take(self) -> bool:
        """Now, or not at all; once taken it stays so until this context is left.  Raises
        CheckpointError where it cannot be.
        """
        leaves_traces()
        try:
            with uninterrupted():
                return self._taken()
        except Interrupted:
            self.release()
            raise

    def _taken(self) -> bool:
        try:
            if self.path.is_dir() and not self.path.is_symlink():
                raise CheckpointError(
                    f"{self.path}: is a directory, wanted a lease file or nothing: remove it"
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path.parent)
            taken = self._thread is None and (
                self._take() or (self._clear_stale() and self._take())
            )
        except OSError as error:
            kind = SaveError if is_transient(error) else CheckpointError
            raise kind(
                f"{self.path}: the lease cannot be taken: {error.strerror or error}"
            ) from None
        if taken:
            self._thread = threading.Thread(target=self._keep_touching, daemon=True)
            self._thread.start()
        return self._thread is not None

    def __enter__(self) -> Lease:
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        with uninterrupted():
            self._release()

    def _release(self) -> None:
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        with suppress(OSError):  # what cannot be removed becomes stale
            if self.held:
                self.path.unlink()
        self._thread = None

    def _take(self) -> bool:
        holder = {
            "token": self.token,
            "job": self.job,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.time(),
        }
        mine = temporary_name(self.path)
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
            return not os.path.lexists(self.path)
        seen, aside = holder.get("token"), temporary_name(self.path)
        with suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if (
                read_lease(aside).get("token") != seen
            ):  # another worker had taken it over in the meantime: back with it
                with suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()
        return not os.path.lexists(self.path)

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
                if self.held:
                    os.utime(self.path)
                else:
                    self.on_loss()


def is_stale(path: Path, stale_s: float = STALE_S) -> bool:
    """Whether this lease is nobody's, as far as the file tells.  False for a lease that is not
    there.
    """
    try:
        touched = path.lstat().st_mtime
        if (content := _read(path)) is None:
            return False
    except IsADirectoryError:
        return True
    except PermissionError:
        content = {"token": "of another user"}
    except OSError:
        return False
    return not content or abs(_now(path.parent) - touched) > stale_s


def read_lease(path: Path) -> dict:
    """Who holds it: token, job, host and pid; {} when nobody does, or when it cannot be read."""
    try:
        return _read(path) or {}
    except OSError:
        return {}


def holder_of(path: Path) -> str:
    """Who holds it, for messages."""
    holder = read_lease(path)
    if not holder:
        return f"a process that cannot be named ({path} cannot be read)"
    return f"process {holder['pid']} on {holder['host']}"


def _read(path: Path) -> dict | None:
    """The content of a lease; None when it is not there, {} when it is not what a worker writes.
    Raises OSError.
    """
    try:
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
            return {}
        content = parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except JSONError:
        return {}
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), str) for key in ("token", "host")
    ):
        return {}
    sound = (
        isinstance(content.get("job", ""), str)
        and is_count(content.get("pid"))
        and content["pid"] > 0
    )
    return content if sound else {}


def _now(folder: Path) -> float:
    """By the clock of the file system, which is not this machine's; by this machine's where nothing
    can be written.
    """
    probe = temporary_name(folder / "now")
    try:
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()
    except OSError:
        return time.time()
