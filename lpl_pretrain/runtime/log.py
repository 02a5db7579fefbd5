"""Logging and progress: a progress bar on a terminal, plain lines elsewhere, and one log file per
rank in the run directory.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

PROGRESS_INTERVAL_S = 15.0
log = logging.getLogger("lpl_pretrain")


def progress(
    total: int | None, unit: str, desc: str, *, initial: int = 0, shown: bool = True
) -> tqdm:
    """Returns a tqdm bar with rate and time left; `shown`: False on all ranks but one.

    If stderr is not a terminal, it prints a plain line every 15 s instead of redrawing.
    """
    if sys.stderr.isatty():
        style: dict[str, Any] = {"dynamic_ncols": True, "smoothing": 0.1}
    else:
        style = {
            "file": _LineWriter(),
            "mininterval": PROGRESS_INTERVAL_S,
            "ncols": 100,
            "ascii": True,
        }
    return tqdm(total=total, unit=unit, desc=desc, initial=initial, disable=not shown, **style)


def set_up_logging(rank: int, file: Path | None = None) -> None:
    """Logs to stderr on rank 0, and on every rank to `file` if one is given."""
    log.setLevel(logging.INFO)
    log.handlers.clear()
    log.propagate = False
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)] if rank == 0 else []
    if file is not None:
        handlers.append(_LogFile(file, delay=True))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)


class _LogFile(logging.FileHandler):
    """Log file that is created, with its folder, at the first line.

    A line that cannot be written does not end the process.
    """

    reported: str | None = None
    """Message about the last line that could not be written; each message is printed once."""

    def _open(self):  # type: ignore[no-untyped-def]
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        message = f"{self.baseFilename}: {error.strerror}: lines of the log are lost"
        if message != self.reported:
            self.reported = message
            sys.stderr.write(f"StorageError: {message}\n")


class _LineWriter:
    """Stream that turns a progress bar's carriage returns into lines on stderr."""

    def write(self, text: str) -> None:
        text = text.replace("\r", "").rstrip()
        if text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
