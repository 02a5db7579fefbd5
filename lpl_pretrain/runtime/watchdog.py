"""Writes the stacks of all threads when no step ends for long: what this rank was doing when the
run hung.

A thread in C does it (faulthandler), so it works while Python waits in a collective or for a lock
that never opens.  A process that is stopped, or whose machine is, writes nothing: of several ranks
the silent one is the suspect.
"""

from __future__ import annotations

import faulthandler
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from statistics import median

from lpl_pretrain.config.schema import WatchdogConfig
from lpl_pretrain.runtime.log import log

AT_FIRST, REMEMBERED = 5, 101
"""Steps to be timed before anything counts as a hang, for the first ones compile; and those of
which the median is taken.
"""


class Watchdog:
    """Not collective; 0.05 ms a step, 0.2 on a busy machine.  `path` is appended to, and removed at
    the end if it is empty.
    """

    def __init__(self, config: WatchdogConfig | None, path: Path) -> None:
        self.config, self.path = config, path
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._last: float | None = None
        self._file: FileIO | None = None
        if config is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            self._written = size_of(self._file)

    def step_done(self) -> None:
        """The last step of training is over, whatever it held; the next one has its time from now
        on.
        """
        now = time.monotonic()
        if self._last is not None:
            self._seconds.append(now - self._last)
            if self._file is not None and (size := size_of(self._file)) > self._written:
                self._written = size
                log.warning(
                    "went on after %.0f s without a step; stacks of that time: %s",
                    self._seconds[-1],
                    self.path,
                )
        self._last = now
        self._arm()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no part of a step and may take any time."""
        faulthandler.cancel_dump_traceback_later()
        yield
        self._arm()

    def close(self) -> None:
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            if not size_of(self._file):
                self.path.unlink(missing_ok=True)
            self._file.close()

    def _arm(self) -> None:
        if self.config is not None and self._file is not None and len(self._seconds) >= AT_FIRST:
            limit_s = max(self.config.at_least_s, self.config.factor * median(self._seconds))
            faulthandler.dump_traceback_later(limit_s, file=self._file)


def size_of(file: FileIO) -> int:
    return os.fstat(file.fileno()).st_size
