"""Actions on files that may fail, here or on a thread, and whose errors all ranks raise alike."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.runtime.dist import first_error


class BackgroundJob:
    """One action; its error is kept for `wait` instead of being raised."""

    def __init__(self, failure: str, action: Callable[[], None]) -> None:
        """`failure`: start of the message if `action` raises anything but a CheckpointError."""
        self.failure = failure
        self.action = action
        self.error: str | None = None
        self.cause: Exception | None = None
        self._thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        try:
            self.action()
        except CheckpointError as error:
            self.error = str(error)
            self.cause = error
        except Exception as error:  # raised on a thread, it would be lost
            self.error = f"{self.failure}: {type(error).__name__}: {error}"
            self.cause = error

    def start(self) -> None:
        """Runs the action on a thread."""
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> str | None:
        """Waits for the thread; returns the error message, if any."""
        self._thread.join()
        return self.error


def run_and_agree(
    failure: str,
    action: Callable[[], None],
    *,
    participates: bool = True,
    error_type: type[CheckpointError] = CheckpointError,
) -> None:
    """Collective.  Runs `action` on the ranks that participate; raises an error of any rank on all
    ranks, with the same message.
    """
    job = BackgroundJob(failure, action if participates else lambda: None)
    job.run()
    error = first_error(job.error)
    if error is not None:
        raise error_type(error) from job.cause
