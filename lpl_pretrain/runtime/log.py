"""How long work speaks: a progress bar on a terminal, plain lines in a log; one file per rank in
the run directory.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm import tqdm

LINE_EVERY_S = 15.0
log = logging.getLogger("lpl_pretrain")


def progress(total: int | None, unit: str, desc: str, *, initial: int = 0) -> tqdm:
    """A tqdm with rate and time left; when stderr is no terminal it writes a plain line every 15 s
    instead of redrawing.
    """
    if sys.stderr.isatty():
        return tqdm(
            total=total, unit=unit, desc=desc, initial=initial, dynamic_ncols=True, smoothing=0.1
        )
    return tqdm(
        total=total,
        unit=unit,
        desc=desc,
        initial=initial,
        file=_Lines(),
        mininterval=LINE_EVERY_S,
        ncols=100,
        ascii=True,
    )


def set_up_logging(rank: int, file: Path | None = None) -> None:
    """Rank 0 speaks on stderr; every rank writes to its own file when one is given."""
    log.setLevel(logging.INFO)
    log.handlers.clear()
    log.propagate = False
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)] if rank == 0 else []
    if file is not None:
        handlers.append(_File(file, delay=True))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)


class _File(logging.FileHandler):
    """Is made with its folder when there is something to write.  A line that cannot be written does
    not end the work.
    """

    refused: str | None = None
    """The reason why the last line could not be written: told once, and not for every line."""

    def _open(self):  # type: ignore[no-untyped-def]
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif self.refused != (
            reason := f"{self.baseFilename}: {error.strerror}: lines of the log are lost"
        ):
            self.refused = reason
            sys.stderr.write(f"StorageError: {reason}\n")


class _Lines:
    """Turns a bar's carriage returns into lines."""

    def write(self, text: str) -> None:
        text = text.replace("\r", "").rstrip()
        if text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
