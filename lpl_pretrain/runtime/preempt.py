"""When to stop early: SIGTERM (torchrun, schedulers) and SIGUSR2 (submitit) only set a flag; the loop asks between steps.

A handler runs between two bytecodes of whatever is going on, a collective included, so it does nothing itself.
"""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Set by a signal; each rank may learn of it at another moment, so ranks must agree before they act on it."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def listen(self) -> StopRequest:
        for number in SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.signal_name = signal.Signals(number).name
