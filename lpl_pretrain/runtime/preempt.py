"""When to stop early: SIGTERM (torchrun, schedulers) and SIGUSR2 (submitit) only set a flag; the
loop asks between steps.

A handler runs between two bytecodes of whatever is going on, a collective included, so for those
two it does nothing itself.

Ctrl-C (SIGINT) is such a flag while training makes steps.  Everywhere else the process ends with
the status 130: at once while there is nothing to remove; later by Interrupted, which is raised in
the main thread.  A second Ctrl-C ends the process at once.

The main thread may be blocked in C, where no Python handler runs: a thread that reads signals from
a pipe, which the C handler writes to, counts them and ends the process.  torchrun gives the first
Ctrl-C to its workers as SIGINT and the second as SIGTERM.
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
"""Exit status after Ctrl-C: 128 and the signal's number, as of a shell."""
GRACE_S = 5.0
"""From a Ctrl-C to the end of a process that does not come to it by itself."""
DELIVERY_S = 1.0
"""Within this time a SIGINT that all processes got, and the copy that torchrun passes on, are one
Ctrl-C.
"""
WAITS = "Ctrl-C: the step under way ends and is saved; a second Ctrl-C leaves at once"


class Interrupted(BaseException):
    """Ctrl-C.  Not a KeyboardInterrupt, which click turns into "Aborted!" and the status 1."""


class StopRequest:
    """Set by a signal; each rank may learn of it at another moment, so ranks must agree before they
    act on it.
    """

    def __init__(self) -> None:
        self.torchrun = False
        """It started this process."""
        self.speaks = True
        """This rank is the one that writes lines."""
        self.peer_failed: Callable[[], bool] = lambda: False
        """A rank beside this one has ended with an error that it recorded, so that torchrun ends
        the others.
        """
        self.signal_name: str | None = None
        self.unwinds = False
        """There may be temporary files or a lease: Ctrl-C raises Interrupted, so that they are
        removed.
        """
        self.finishes_step = False
        """Ctrl-C waits for the end of a step: set once this start has made one."""
        self.how_to_go_on = "the same command goes on from there"
        self.farewell = "interrupted"
        """The line at the end of what Ctrl-C ended early."""
        self.defers = 0
        """So many blocks are under way that Ctrl-C does not interrupt."""
        self._first_s: float | None = None
        self.listens = self._raised = self._sigint = False

    def __bool__(self) -> bool:
        return self.signal_name is not None

    @property
    def interrupted(self) -> bool:
        """By Ctrl-C."""
        return self._sigint or self._first_s is not None

    def listen(self, numbers: Sequence[signal.Signals] = SIGNALS) -> StopRequest:
        """To SIGINT and to `numbers`, from the main thread.  May be called again, for more of them."""
        for number in (signal.SIGINT, *numbers):
            signal.signal(number, self._note)
        if self.listens:
            return self
        self.listens = True
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        sys.unraisablehook = self._not_swallowed
        threading.Thread(target=self._watch, args=(reading,), daemon=True, name="signals").start()
        return self

    def leave(self) -> None:
        """Ends the process without unwinding, from any thread."""
        if self.speaks:
            say(self.farewell)
        os._exit(INTERRUPTED)

    def _note(self, number: int, frame: object) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name
        self._sigint = self._sigint or number == signal.SIGINT
        self.unwind()

    def unwind(self) -> None:
        """Raises Interrupted once, after Ctrl-C, where there is something to remove and no step to
        finish.
        """
        if (
            self._sigint
            and self.unwinds
            and not (self.finishes_step or self.defers or self._raised)
        ):
            self._raised = True
            raise Interrupted(self.farewell)

    def _watch(self, reading: int) -> None:
        while True:
            for number in os.read(reading, 64):
                self._count(number, time.monotonic())

    def _count(self, number: int, now_s: float) -> None:
        if number == signal.SIGTERM and not self.finishes_step and self.peer_failed():
            os._exit(1)  # it waits for that rank
        if self._first_s is None:
            if number == signal.SIGINT:
                self._first_s = now_s
                if not self.finishes_step:
                    threading.Timer(GRACE_S if self.unwinds else 0.0, self.leave).start()
                elif self.speaks:
                    say(WAITS)
        elif self._insists(number, now_s - self._first_s):
            self.leave()

    def _insists(self, number: int, after_s: float) -> bool:
        """Whether a signal that came so long after the first SIGINT is a second Ctrl-C."""
        if number == signal.SIGINT:
            return not self.torchrun or after_s > DELIVERY_S
        return number == signal.SIGTERM and self.torchrun

    def _not_swallowed(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Where Python can only print an exception, in a finalizer, say."""
        if issubclass(unraisable.exc_type, Interrupted):
            self.leave()
        sys.__unraisablehook__(unraisable)


_current = StopRequest()


def stop_request() -> StopRequest:
    """The one of this process, which listens to Ctrl-C from the first call on."""
    return _current if _current.listens else _current.listen(())


def leaves_traces() -> None:
    """From now on there is something to remove when this process ends early."""
    _current.unwinds = True


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C raises Interrupted behind this block instead of inside.  For short work that must not
    end half done.
    """
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # which is the one that is interrupted
        yield
        return
    stop = _current
    stop.defers += 1
    try:
        yield
    finally:
        stop.defers -= 1
    stop.unwind()


def say(text: str) -> None:
    """A line on stderr, below a progress bar, without the locks that an interrupted thread may
    hold.
    """
    os.write(2, ("\n" * os.isatty(2) + text + "\n").encode())
