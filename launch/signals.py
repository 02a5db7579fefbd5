"""SIGTERM and SIGUSR2 from SLURM, forwarded to the process that does a task's work.

lpl_pretrain/runtime/preempt.py handles them there: a checkpoint, then the end.
"""

from __future__ import annotations

import signal
import subprocess

FORWARDED = (signal.SIGUSR2, signal.SIGTERM)
"""SIGINT is not forwarded: SLURM sends it to all processes of a step, and the child would take a
second one for another Ctrl-C.
"""


class SignalForwarder:
    """Catches SLURM's signals from construction on, and forwards the first to the child, which may
    start later.
    """

    def __init__(self) -> None:
        self.received = 0
        """First signal that arrived; 0 when none did."""
        self._to_forward = 0
        self._child: subprocess.Popen[bytes] | None = None
        for number in (*FORWARDED, signal.SIGINT):
            signal.signal(number, self._handle)

    def forward_to(self, child: subprocess.Popen[bytes]) -> None:
        """Forward to `child`, at once if a signal arrived before it started."""
        self._child = child
        if self._to_forward:
            child.send_signal(self._to_forward)

    def _handle(self, number: int, frame: object) -> None:
        self.received = self.received or number
        if number in FORWARDED and not self._to_forward:
            self._to_forward = number
            if self._child is not None:
                self._child.send_signal(number)
