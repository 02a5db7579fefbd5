"""Atomic writes: a file is written under a temporary name and then renamed, so that a file that
exists is complete.
"""

from __future__ import annotations

import json
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
from typing import Any

from lpl_pretrain.runtime.preempt import needs_cleanup

LEFTOVER = re.compile(r"^\..*\.(?P<host>[^.]+)-(?P<pid>\d+)-[0-9a-f]{8}\.tmp$")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` when the block ends, removes it
    when the block raises.

    Leftovers of killed processes of this machine in the folder are removed.  An OSError names
    `path`.
    """
    with add_path_to_oserror(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        needs_cleanup()
        remove_leftovers(path.parent)
        temporary = temporary_name(path)
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # must not hide the first error
                temporary.unlink(missing_ok=True)
            raise


def atomic_write_json(path: Path, value: Any, *, indent: int = 2) -> None:
    """Writes `value` to `path` as JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n")


def temporary_name(path: Path) -> Path:
    """Returns a path beside `path`, unique on a file system that several nodes share.

    It contains host and process ID, which `remove_leftovers` reads.
    """
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextmanager
def add_path_to_oserror(path: Path) -> Iterator[None]:
    """Adds `path` to an OSError that names no file, such as one of write or fsync, which get only a
    descriptor.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """Yields a new folder in TMPDIR and removes it at the end.

    Leftovers of killed processes of this machine are removed first.
    """
    parent = Path(tempfile.gettempdir())
    needs_cleanup()
    with suppress(OSError):  # leftovers of other users
        remove_leftovers(parent)
    folder = temporary_name(parent / name)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files and folders whose process ran on this machine and has ended.

    A process does so once per folder.
    """
    _remove_leftovers(folder, os.getpid())


@cache
def _remove_leftovers(folder: Path, pid: int) -> None:
    if not Path("/proc/self").exists():
        return
    for name in os.listdir(folder):
        match = LEFTOVER.match(name)
        if match and match["host"] == _host() and not Path(f"/proc/{match['pid']}").exists():
            _remove(folder / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())
