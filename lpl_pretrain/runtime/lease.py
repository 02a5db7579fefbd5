"""Lease on a task: one process at a time holds it, on a file system that several nodes share.

A lease is a file that is created complete, by a hard link, so that only one process succeeds.  Its
holder touches it regularly.  It expires when it was not touched for `STALE_S`, when its process on
this host has ended, or when this same job held it before it was requeued.  An expired lease is
taken over by a rename, so that only one process succeeds.  Times are compared on the file system's
own clock.

A file that is not a valid lease (empty, truncated, edited, a link or a pipe) counts as expired at
once, because a lease is created complete; so does one that was touched far in the future.  One that
cannot be read (no permission, an I/O error) is left alone until it is stale.

A process on a node that does not answer may still run.  If it was disconnected or suspended and its
lease was taken over, it finds out when it touches the lease or calls `check_ownership`, and
`on_loss` is called (fencing).
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
from lpl_pretrain.runtime.atomic import add_path_to_oserror, remove_leftovers, temporary_name
from lpl_pretrain.runtime.preempt import Interrupted, defer_interrupt, needs_cleanup

STALE_S = 120.0
TOUCH_INTERVAL_S = 15.0
MAX_BYTES = 1 << 16


class Lease:
    """Lease on `path`: `with Lease(path) as lease: if lease.held: ...`; it never waits."""

    def __init__(
        self,
        path: Path,
        *,
        job: str = "",
        on_loss: Callable[[], None] = lambda: None,
        stale_s: float = STALE_S,
        touch_s: float = TOUCH_INTERVAL_S,
    ) -> None:
        """`job`: ID of a scheduler's job, which never runs twice at a time.  `on_loss` may be
        called on a thread.
        """
        self.path = path
        self.job = job
        self.on_loss = on_loss
        self.stale_s = stale_s
        self.touch_s = touch_s
        self.token = secrets.token_hex(8)
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether this process holds the lease, according to the file."""
        return self._thread is not None and (_read(self.path) or {}).get("token") == self.token

    def check_ownership(self) -> None:
        """Calls `on_loss` if the lease was taken over; call it before every write to shared files.

        Raises SaveError if the lease was released: a save may still run in the background while an
        error ends the training.
        """
        if self._released.is_set():
            raise SaveError(
                f"{self.path}: was released because training has ended: nothing is saved any more"
            )
        if not self.held:
            self.on_loss()

    def other_holder(self) -> dict:
        """Content of the lease if a live process holds it, else {}."""
        holder = read_lease(self.path)
        if not holder or is_stale(self.path, self.stale_s) or self._is_dead(holder):
            return {}
        return holder

    def take(self) -> bool:
        """Takes the lease if it is free or expired, without waiting; returns whether it is held.

        Raises CheckpointError, or SaveError for a transient I/O error.
        """
        needs_cleanup()
        try:
            with defer_interrupt():
                return self._try_take()
        except Interrupted:
            self.release()
            raise

    def _try_take(self) -> bool:
        try:
            if self.path.is_dir() and not self.path.is_symlink():
                raise CheckpointError(
                    f"{self.path}: is a directory, wanted a lease file or nothing: remove it"
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path.parent)
            taken = self._thread is None and (
                self._create() or (self._remove_expired() and self._create())
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
        """Removes the lease if this process holds it."""
        with defer_interrupt():
            self._release()

    def _release(self) -> None:
        if self._thread is None:
            return
        self._released.set()
        self._thread.join()
        with suppress(OSError):  # a file that cannot be removed becomes stale
            if self.held:
                self.path.unlink()
        self._thread = None

    def _create(self) -> bool:
        """Creates the file; returns False if it exists."""
        holder = {
            "token": self.token,
            "job": self.job,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.time(),
        }
        temporary = temporary_name(self.path)
        try:
            with add_path_to_oserror(temporary):
                temporary.write_text(json.dumps(holder))
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _remove_expired(self) -> bool:
        """Removes an expired lease; returns whether no lease is left."""
        holder = read_lease(self.path)
        if not (is_stale(self.path, self.stale_s) or self._is_dead(holder)):
            return not os.path.lexists(self.path)
        expired_token = holder.get("token")
        renamed = temporary_name(self.path)
        with suppress(FileNotFoundError):
            os.rename(self.path, renamed)
            if read_lease(renamed).get("token") != expired_token:
                # Another process took the lease over in the meantime: put its lease back.
                with suppress(FileExistsError):
                    os.link(renamed, self.path)
            renamed.unlink()
        return not os.path.lexists(self.path)

    def _is_dead(self, holder: dict) -> bool:
        """Whether `holder` has certainly ended: a process of this host, or of this requeued job."""
        if self.job and holder.get("job") == self.job:
            return True
        return (
            holder.get("host") == socket.gethostname()
            and not Path(f"/proc/{holder['pid']}").exists()
            and Path("/proc/self").exists()
        )

    def _keep_touching(self) -> None:
        while not self._released.wait(self.touch_s):
            with suppress(OSError):  # the file system may recover
                if self.held:
                    os.utime(self.path)
                else:
                    self.on_loss()


def is_stale(path: Path, stale_s: float = STALE_S) -> bool:
    """Whether this lease has expired, according to the file alone.  False for one that does not
    exist.
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
    """Content of a lease: token, job, host and pid; {} if it is not valid or cannot be read."""
    try:
        return _read(path) or {}
    except OSError:
        return {}


def describe_holder(path: Path) -> str:
    """Describes the holder of a lease in messages."""
    holder = read_lease(path)
    if not holder:
        return f"a process that cannot be named ({path} cannot be read)"
    return f"process {holder['pid']} on {holder['host']}"


def _read(path: Path) -> dict | None:
    """Content of a lease; None if no file exists, {} if it is not valid.  Raises OSError."""
    try:
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            return {}
        content = parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except JSONError:
        return {}
    return content if _is_valid(content) else {}


def _is_valid(content: object) -> bool:
    return (
        isinstance(content, dict)
        and isinstance(content.get("token"), str)
        and isinstance(content.get("host"), str)
        and isinstance(content.get("job", ""), str)
        and is_count(content.get("pid"))
        and content["pid"] > 0
    )


def _now(folder: Path) -> float:
    """Current time on the file system's clock, in seconds; on this machine's clock if nothing can
    be written.
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
