"""Writes files of a data folder atomically, or exclusively if several processes may write one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.atomic import atomic_write, remove_leftovers, temporary_name

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
"""Error numbers of file systems that have no hard links."""


def publish(path: Path, chunks: list[bytes]) -> None:
    """Writes or replaces a file atomically.  Raises DataError if the disk is full; an existing file
    then stays as it was.
    """
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            file.writelines(chunks)
    except OSError as error:
        raise disk_error(path, error, sum(map(len, chunks))) from None


def publish_new(path: Path, chunks: list[bytes]) -> bool:
    """Creates a file with these contents and returns True; returns False if the file exists, which
    stays as it is.  Exactly one of several processes succeeds.

    Raises FileNotFoundError if the folder does not exist, DataError if the disk is full.
    """
    temporary = temporary_name(path)
    try:
        remove_leftovers(path.parent)
        write_file(temporary, chunks)
        try:
            os.link(temporary, path)  # atomic on NFS too
        except FileExistsError:
            # NFS may report this for a link that its own first attempt has created
            return os.stat(temporary).st_nlink > 1
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _create(path, chunks)
        return True
    except FileNotFoundError:
        raise
    except OSError as error:
        raise disk_error(path, error, sum(map(len, chunks))) from None
    finally:
        temporary.unlink(missing_ok=True)


def _create(path: Path, chunks: list[bytes]) -> bool:
    """Does the same as `publish_new` without hard links; a kill leaves a partial file, which its
    reader refuses.
    """
    try:
        with open(path, "xb", buffering=0) as file:
            file.write(b"".join(chunks))
    except FileExistsError:
        return False
    return True


def write_file(path: Path, chunks: list[bytes]) -> None:
    """Raises FileNotFoundError if the folder does not exist, DataError if the disk is full."""
    try:
        with open(path, "wb") as file:
            file.writelines(chunks)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise disk_error(path, error, sum(map(len, chunks))) from None


def disk_error(path: Path, error: OSError, size: int) -> DataError:
    """Error for a failed write of `size` bytes to `path`."""
    return DataError(
        f"{path}: {error.strerror} while writing {size / 2**20:.1f} MiB: free disk space and run "
        "the same command again; finished parts are kept"
    )
