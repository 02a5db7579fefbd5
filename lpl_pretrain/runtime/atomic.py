"""Writing under a temporary name, then renaming: a file that exists is whole."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from lpl_pretrain.runtime.preempt import leaves_traces

LEFTOVER = re.compile(r"^\..*\.(?P<host>[^.]+)-(?P<pid>\d+)-[0-9a-f]{8}\.tmp$")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` when the block ends, and nothing is left
    when it raises.

    What killed processes of this machine left in the folder is removed.  An OSError names `path`.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        leaves_traces()
        remove_leftovers(path.parent)
        temporary = temporary_name(path)
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # it must not hide the first error
                temporary.unlink(missing_ok=True)
            raise


def temporary_name(path: Path) -> Path:
    """Beside `path`, unique on a file system that several nodes share; it says whose it is (see
    remove_leftovers).
    """
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that passes through here and names no file names `path`: write and fsync know
    descriptors only.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A folder in TMPDIR, which is removed at the end.  Those that killed processes of this machine
    left are removed first.
    """
    parent = Path(tempfile.gettempdir())
    leaves_traces()
    with suppress(OSError):  # those of other users
        remove_leftovers(parent)
    folder = temporary_name(parent / name)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Temporary files and folders whose process was on this machine and is gone; looked for once by
    each process and folder.
    """
    _remove_leftovers(folder, os.getpid())


@cache
def _remove_leftovers(folder: Path, pid: int) -> None:
    if not Path("/proc/self").exists():
        return
    for name in os.listdir(folder):
        found = LEFTOVER.match(name)
        if found and found["host"] == _host() and not Path(f"/proc/{found['pid']}").exists():
            _remove(folder / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())
