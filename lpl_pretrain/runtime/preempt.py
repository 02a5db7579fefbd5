"""Early stop on signals: SIGTERM (torchrun, schedulers), SIGUSR2 (submitit) and Ctrl-C (SIGINT).

SIGTERM and SIGUSR2 only set a flag, which the training loop reads between steps: a Python handler
runs between two bytecodes of whatever is going on, a collective included.

Ctrl-C sets such a flag too while training makes steps.  Everywhere else it ends the process with
status 130: at once while there is nothing to clean up, and later by raising Interrupted in the main
thread.  A second Ctrl-C ends the process at once.

The main thread may be blocked in C, where no Python handler runs.  So a thread reads signals from a
pipe, which the C handler writes to, counts them and ends the process.  torchrun sends its workers
the first Ctrl-C as SIGINT and the second as SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 plus the signal's number, as of a shell."""
GRACE_S = 5.0
"""Time after a Ctrl-C at which a process that has not ended by itself is ended."""
DELIVERY_S = 1.0
"""Within this time, a SIGINT that the whole process group received and the copy that torchrun sends
count as one Ctrl-C.
"""
FINISHING_STEP_MESSAGE = (
    "Ctrl-C: the current step ends and is saved; a second Ctrl-C ends the process at once"
)


class Interrupted(BaseException):
    """Raised after Ctrl-C; click would turn a KeyboardInterrupt into "Aborted!" and status 1."""


class StopRequest:
    """Flag that a signal sets.

    Ranks may receive the signal at different moments, so they must agree before they act on it.
    """

    def __init__(self) -> None:
        self.under_torchrun = False
        """Whether torchrun started this process."""
        self.prints = True
        """Whether this rank prints messages."""
        self.peer_failed: Callable[[], bool] = lambda: False
        """Returns whether another rank of this node has recorded an error, so that torchrun is
        ending the others.
        """
        self.signal_name: str | None = None
        self.has_cleanup = False
        """Whether there may be temporary files or a lease: Ctrl-C then raises Interrupted, so that
        they are removed.
        """
        self.finishes_step = False
        """Whether Ctrl-C waits for the end of a step: set once this process has made one."""
        self.resume_hint = "the same command goes on from there"
        self.exit_message = "interrupted"
        """Printed when Ctrl-C ends the process."""
        self.deferring_blocks = 0
        """Number of active blocks that Ctrl-C must not interrupt."""
        self.listening = False
        self._first_sigint_s: float | None = None
        self._raised = False
        self._sigint_noted = False

    def __bool__(self) -> bool:
        return self.signal_name is not None

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._sigint_noted or self._first_sigint_s is not None

    def listen(self, signals: Sequence[signal.Signals] = SIGNALS) -> StopRequest:
        """Installs handlers for SIGINT and `signals`.  Call it from the main thread; it may be
        called again with other signals.
        """
        for number in (signal.SIGINT, *signals):
            signal.signal(number, self._note)
        if self.listening:
            return self
        self.listening = True
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        sys.unraisablehook = self._exit_on_unraisable
        threading.Thread(target=self._watch, args=(reading,), daemon=True, name="signals").start()
        return self

    def exit_now(self) -> None:
        """Ends the process without unwinding; may be called from any thread."""
        if self.prints:
            write_stderr(self.exit_message)
        os._exit(INTERRUPTED)

    def _note(self, number: int, frame: object) -> None:
        """Python's signal handler: sets the flag; after Ctrl-C may raise Interrupted."""
        self.signal_name = self.signal_name or signal.Signals(number).name
        self._sigint_noted = self._sigint_noted or number == signal.SIGINT
        self.raise_if_interrupted()

    def raise_if_interrupted(self) -> None:
        """Raises Interrupted, once, after Ctrl-C, if there is something to clean up and no step or
        block to finish.
        """
        waits = self.finishes_step or self.deferring_blocks or self._raised
        if self._sigint_noted and self.has_cleanup and not waits:
            self._raised = True
            raise Interrupted(self.exit_message)

    def _watch(self, reading: int) -> None:
        """Reads the numbers of signals from the pipe; runs on a thread."""
        while True:
            for number in os.read(reading, 64):
                self._count(number, time.monotonic())

    def _count(self, number: int, now_s: float) -> None:
        if number == signal.SIGTERM and not self.finishes_step and self.peer_failed():
            os._exit(1)  # the main thread waits for the failed rank
        if self._first_sigint_s is None:
            if number == signal.SIGINT:
                self._first_sigint_s = now_s
                if not self.finishes_step:
                    delay_s = GRACE_S if self.has_cleanup else 0.0
                    threading.Timer(delay_s, self.exit_now).start()
                elif self.prints:
                    write_stderr(FINISHING_STEP_MESSAGE)
        elif self._is_second_ctrl_c(number, now_s - self._first_sigint_s):
            self.exit_now()

    def _is_second_ctrl_c(self, number: int, elapsed_s: float) -> bool:
        """Whether a signal that arrives `elapsed_s` after the first SIGINT is a second Ctrl-C."""
        if number == signal.SIGINT:
            return not self.under_torchrun or elapsed_s > DELIVERY_S
        return number == signal.SIGTERM and self.under_torchrun

    def _exit_on_unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Ends the process where Python would only print Interrupted, as in a finalizer."""
        if issubclass(unraisable.exc_type, Interrupted):
            self.exit_now()
        sys.__unraisablehook__(unraisable)


_current = StopRequest()


def stop_request() -> StopRequest:
    """Returns the request of this process; the first call starts to listen to Ctrl-C."""
    return _current if _current.listening else _current.listen(())


def needs_cleanup() -> None:
    """Declares that from now on an early end of this process must clean up."""
    _current.has_cleanup = True


@contextmanager
def defer_interrupt() -> Iterator[None]:
    """Makes Ctrl-C raise Interrupted after this block instead of inside.

    For short work that must not end half done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    stop = _current
    stop.deferring_blocks += 1
    try:
        yield
    finally:
        stop.deferring_blocks -= 1
    stop.raise_if_interrupted()


def write_stderr(text: str) -> None:
    """Prints a line on stderr, below a progress bar, without the locks that an interrupted thread
    may hold.
    """
    os.write(2, ("\n" * os.isatty(2) + text + "\n").encode())
