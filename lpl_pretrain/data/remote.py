"""Downloads whole files from URLs: verified, renamed to their final name when complete, retried
when the network fails.
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

from lpl_pretrain.config.hashing import file_sha256
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.atomic import atomic_write
from lpl_pretrain.runtime.log import log

FIRST_WAIT_S = 1.0
MAX_WAIT_S = 60.0


class _WrongDigest(OSError):
    pass


def _is_transient(error: BaseException) -> bool:
    """Whether another attempt may succeed: not where a file is missing or access is denied."""
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError)


def download(url: str, path: Path, sha256: str | None = None, retries: int = 6) -> Path:
    """Downloads `url` to `path` and returns `path`.

    Waits 1, 2, 4 ... s (with jitter) between attempts.  Raises DataError after the last one.
    """
    attempts = Retrying(
        retry=retry_if_exception(_is_transient),
        stop=stop_after_attempt(1 + retries),
        wait=wait_exponential_jitter(FIRST_WAIT_S, MAX_WAIT_S, jitter=FIRST_WAIT_S),
        before_sleep=before_sleep_log(log, logging.WARNING),
        reraise=True,
    )
    try:
        attempts(_download_once, url, path, sha256)
    except FileNotFoundError:
        raise DataError(
            f"{url}: not found: copy it there again, or encode the folder again"
        ) from None
    except Exception as error:  # drivers behind fsspec raise errors of their own
        raise DataError(
            f"{url}: cannot be downloaded ({error}): check the address, the credentials, and the "
            f"free space on {path.parent}"
        ) from None
    return path


def _download_once(url: str, path: Path, sha256: str | None) -> None:
    with atomic_write(path) as temporary:
        with fsspec.open(url, "rb") as source, open(temporary, "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        if sha256 is not None and (actual := file_sha256(temporary)) != sha256:
            raise _WrongDigest(f"sha256 is {actual}, index.json says {sha256}")
