"""Files behind URLs: fetched whole, checked, under their name only when complete; tried again when
the network fails.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import fsspec
from tenacity import (
    Retrying,
    before_sleep_log,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from lpl_pretrain.data.format import file_sha256
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.atomic import atomic_write
from lpl_pretrain.runtime.log import log

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


class _Damaged(OSError):
    pass


def _may_pass(problem: BaseException) -> bool:
    """Networks recover; what is not there, or not allowed, stays so."""
    return isinstance(problem, OSError) and not isinstance(
        problem, FileNotFoundError | PermissionError
    )


def download(url: str, path: Path, sha256: str | None = None, retries: int = 6) -> Path:
    """`path`, holding what `url` holds.  Waits 1, 2, 4 ... s (with jitter) between tries.  Raises
    DataError in the end.
    """
    attempts = Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(1 + retries),
        wait=wait_exponential_jitter(FIRST_WAIT_S, LONGEST_WAIT_S, jitter=FIRST_WAIT_S),
        before_sleep=before_sleep_log(log, logging.WARNING),
        reraise=True,
    )
    try:
        attempts(_download_once, url, path, sha256)
    except FileNotFoundError:
        raise DataError(
            f"{url}: not found: copy it there again, or encode the folder again"
        ) from None
    except Exception as problem:  # drivers behind fsspec raise errors of their own
        raise DataError(
            f"{url}: cannot be fetched ({problem}): check address, credentials, and room on "
            f"{path.parent}"
        ) from None
    return path


def _download_once(url: str, path: Path, sha256: str | None) -> None:
    with atomic_write(path) as temporary:
        with fsspec.open(url, "rb") as source, open(temporary, "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        if sha256 is not None and (found := file_sha256(temporary)) != sha256:
            raise _Damaged(f"sha256 is {found}, index.json says {sha256}")
