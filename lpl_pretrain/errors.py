"""The errors a user can act on: each message names the key or path, the value found, the value
wanted, and the remedy.

They are at the root of the package because `config`, the lowest layer, raises them too.  `assert`
is for our own bugs.
"""

from __future__ import annotations

import errno
import io
import os
import re
from pathlib import Path

BAD_INPUT = 2
"""Exit status for what is the input's fault: trying again would not help."""
UNFIT = 75
"""Exit status of a process whose node cannot train: trying again would help on another one."""


TRANSIENT_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        *(
            "EIO",
            "ENOSPC",
            "EDQUOT",
            "EROFS",
            "ESTALE",
            "EBUSY",
            "EAGAIN",
            "EINTR",
            "EMFILE",
            "ENFILE",
            "ENOMEM",
        ),
        *(
            "ETIMEDOUT",
            "ENETDOWN",
            "ENETUNREACH",
            "ECONNRESET",
            "ECONNABORTED",
            "ECONNREFUSED",
            "EHOSTUNREACH",
        ),
        *("ENOTCONN", "EREMOTEIO", "ENOLINK", "ECOMM", "ENODEV", "ENXIO"),
    )
    if hasattr(errno, name)
)
"""Errors of storage, memory and networks after which another try may succeed."""


SYSTEM_ERROR = re.compile(r"\((?:os error )?(\d+)\)")
"""Error number in the text of errors that are no OSError: those of Rust, in which safetensors is
written, and of torch.
"""


LOST_RANK = re.compile(
    r"[Cc]onnection (closed by|reset by|was likely closed)|Broken pipe|remote process exited"
)
"""Text of the errors of gloo, NCCL and torch.distributed's store when the process at the other end
is gone.
"""


class LPLError(Exception):
    """Base of every error that is the input's fault; the command line prints it without a
    traceback.
    """

    status = BAD_INPUT


class ConfigError(LPLError):
    """A configuration that cannot run."""


class DataError(LPLError):
    """A picture, shard or data folder that cannot be used."""


class CheckpointError(LPLError):
    """A checkpoint that is incomplete, damaged, or belongs to another run."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files contradict each other; an older one may be sound."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written: the disk's fault, which may be gone when the run is
    begun again.
    """

    status = 1


class NonFiniteError(LPLError):
    """A loss or gradient that is NaN or infinite, found before it reached a parameter."""


class SpikeError(LPLError):
    """A gradient norm or loss far above those of the last updates, found before the update."""


class PreflightError(LPLError):
    """A requirement of training that no node meets, detected before training begins."""

    def __init__(self, message: str, status: int = BAD_INPUT) -> None:
        """`status` 1: it may be there when the job is tried again."""
        super().__init__(message)
        self.status = status


class StorageError(LPLError):
    """A file system that refuses a read or write for a reason that may pass: a full disk, a lost
    server.
    """

    status = 1

    @classmethod
    def of(cls, error: Exception) -> StorageError | None:
        """StorageError of a transient error of a file system; None for any other error."""
        remedy = "look at the file system, then run the same command again"
        if isinstance(error, OSError) and is_transient(error):
            return cls(
                f"{error.filename2 or error.filename or file_in_use(error)}: "
                f"{error.strerror or error}: {remedy}"
            )
        found = SYSTEM_ERROR.search(str(error))
        if found and int(found[1]) in TRANSIENT_ERRNOS and os.strerror(int(found[1])) in str(error):
            return cls(f"{file_in_use(error)}: {error}: {remedy}")
        return None


def file_in_use(error: BaseException) -> str:
    """File of an error that names none: the innermost path or open file on the stack."""
    found, frame = "a file", error.__traceback__
    while frame is not None:
        for value in frame.tb_frame.f_locals.values():
            if isinstance(value, Path):
                found = str(value)
            elif isinstance(value, io.IOBase) and isinstance(
                name := getattr(value, "name", None), str
            ):
                found = name
        frame = frame.tb_next
    return found


def transient_reason(error: BaseException | None) -> str | None:
    """Reason in the system's words why an error may pass: it has its origin in an OSError with one
    of TRANSIENT_ERRNOS.

    Only the text arrives here of an error of another rank, or of a library that is not written in
    Python.
    """
    while error is not None:
        found = error.errno if isinstance(error, OSError) else None
        text = str(error)
        for number in TRANSIENT_ERRNOS:
            if number == found or os.strerror(number) in text:
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def is_transient(error: BaseException | None) -> bool:
    """True for an error that another try may not meet."""
    return transient_reason(error) is not None


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, whose own error says why."""
    return isinstance(error, RuntimeError) and LOST_RANK.search(str(error)) is not None


def exit_status(error: LPLError) -> int:
    """1 instead of BAD_INPUT where the same command may succeed later."""
    return 1 if error.status == BAD_INPUT and is_transient(error) else error.status
