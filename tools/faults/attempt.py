"""One start of a job with planned faults, and checks of how it ended."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lpl_pretrain.errors import BAD_INPUT
from lpl_pretrain.runtime.lease import read_lease
from tools.faults.layer import FULL_DISK, FileLayer, Hit
from tools.faults.plan import Fault, FileFault, LostLease, SignalFault
from tools.faults.processes import GRACE_S, Ranks, is_stopped

POLL_S = 0.01
RESUME_S = 0.3
HANG_S = 240.0
LOST_LEASE_EXIT_S = 60.0
ERROR_LINE = re.compile(r"\b\w*Error: .*$", re.MULTILINE)
TRACEBACK = "Traceback (most recent call last)"


@dataclass
class AttemptResult:
    """Exit statuses, output and faults of one attempt, and problems found on the way."""

    statuses: list[int]
    output: dict[str, str]
    hits: list[Hit]
    happened: list[Fault]
    """Faults that hit a running process."""
    seconds: float
    problems: list[str] = field(default_factory=list)

    @property
    def succeeded(self) -> bool:
        return not any(self.statuses)

    def count(self) -> Counter[str]:
        return Counter(fault.kind for fault in self.happened)


class Attempt:
    """Starts `ranks` and injects `plan`; an undisturbed start takes `seconds`."""

    def __init__(
        self,
        ranks: Ranks,
        layer: FileLayer,
        plan: Sequence[Fault],
        seconds: float,
        lease: Path | None,
    ) -> None:
        self.ranks, self.layer, self.seconds, self.lease = ranks, layer, seconds, lease
        self.files = [fault for fault in plan if isinstance(fault, FileFault)]
        self.signals = sorted(
            (f for f in plan if isinstance(f, SignalFault)), key=lambda fault: fault.at
        )
        self.lost = next((fault for fault in plan if isinstance(fault, LostLease)), None)
        self.happened: list[Fault] = []
        self.problems: list[str] = []
        self._resume: list[tuple[float, int]] = []

    def run(self, inspect: Callable[[], None] = lambda: None) -> AttemptResult:
        """Run to the end of all ranks, then call `inspect` and clear the file layer's log."""
        self.layer.clear()
        self.ranks.environment |= self.layer.environment(self.files)
        self.started = time.monotonic()
        self.ranks.start()
        deadline = None
        while self.ranks.running():
            now = time.monotonic()
            self._signal(now - self.started)
            self._continue(now)
            if self.lost is not None and now - self.started > self.lost.at * self.seconds:
                self._lose_lease(self.lost)
            if deadline is None and self.ranks.communicate and self.ranks.failed():
                deadline = now + GRACE_S
            if deadline is not None and now > deadline:
                self.ranks.end()
            if now - self.started > HANG_S + 10 * self.seconds:
                self.problems.append(f"hangs: no end after {now - self.started:.0f} s")
                self.ranks.end()
            time.sleep(POLL_S)
        statuses, seconds = self.ranks.statuses(), time.monotonic() - self.started
        hits = self.layer.hits()
        inspect()
        self.layer.clear()
        numbers = {hit.number for hit in hits}
        self.happened += [
            fault for number, fault in enumerate(self.files, start=1) if number in numbers
        ]
        result = AttemptResult(
            statuses, self.ranks.output(), hits, self.happened, seconds, self.problems
        )
        result.problems += [*error_problems(result, str(self.layer.root))]
        return result

    def _signal(self, passed: float) -> None:
        """Send the signals that are due `passed` seconds after the start."""
        while self.signals and passed > self.signals[0].at * self.seconds:
            fault = self.signals.pop(0)
            if met := self.ranks.send(fault.number, fault.rank):
                self.happened.append(fault)
            if fault.resume_s is not None:
                self._resume += [(time.monotonic() + fault.resume_s, pid) for pid in met]

    def _continue(self, now: float) -> None:
        """Send SIGCONT to processes that a signal or the file layer stopped long enough ago."""
        known = {pid for _, pid in self._resume}
        stopped = [
            hit.pid for hit in self.layer.hits() if hit.action == "stop" and hit.pid not in known
        ]
        self._resume += [(now + RESUME_S, pid) for pid in stopped if is_stopped(pid)]
        for at, pid in list(self._resume):
            if now > at:
                self._resume.remove((at, pid))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _lose_lease(self, fault: LostLease) -> None:
        """Suspend all ranks, expire their lease and start a second set of ranks.

        The suspended ranks must exit by themselves once they resume.
        """
        self.lost = None
        if self.lease is None or not self.lease.exists():
            return
        suspended = self.ranks.send(signal.SIGSTOP)
        if not suspended:
            return
        old = self.ranks
        long_ago = time.time() - 3600
        with suppress(FileNotFoundError):
            os.utime(self.lease, (long_ago, long_ago))
        self.happened.append(fault)
        self.ranks = Ranks(
            old.command,
            old.count,
            {**old.environment, "LPL_CHAOS_PLAN": ""},
            old.logs / "successor",
            old.mark,
            communicate=old.communicate,
        )
        held = read_lease(self.lease)
        self.ranks.start()
        # resume the old ranks only once the new ones hold the lease
        while read_lease(self.lease) == held and self.ranks.running():
            time.sleep(POLL_S)
        time.sleep(fault.resume_s)
        deadline = time.monotonic() + LOST_LEASE_EXIT_S
        for pid in suspended:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        while old.running() and not old.failed() and (now := time.monotonic()) < deadline:
            self._continue(now)
            time.sleep(POLL_S)
        if old.running() and not old.failed():
            self.problems.append(f"still running {LOST_LEASE_EXIT_S:.0f} s after it lost its lease")
        for process in old.processes:
            with suppress(Exception):
                process.wait(GRACE_S)
        for pid in suspended:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if old.statuses()[0] == 0:
            self.problems.append("exit status 0 after it lost its lease")


def error_problems(result: AttemptResult, root: str) -> list[str]:
    """Problems of how an attempt reported an input or output error that ended it.

    It must print one line with our error, the path and the reason, and its exit status must not
    mean bad input, which is never retried.
    """
    problems = []
    if BAD_INPUT in result.statuses:
        output = next((text for text in result.output.values() if ERROR_LINE.search(text)), "")
        problems.append(f"exit status {BAD_INPUT}, which means bad input: {last_error(output)}")
    errors = {
        hit.number: hit for hit in result.hits if hit.action.isdigit() or hit.number == FULL_DISK
    }
    refused = [hit for hit in errors.values() if hit.action != str(errno.EINTR)]
    killed = any(status < 0 for status in result.statuses)
    if (
        result.succeeded
        or not refused
        or killed
        or any(isinstance(f, LostLease) for f in result.happened)
    ):
        return problems
    reasons = {
        os.strerror(errno.ENOSPC if hit.action == "full" else int(hit.action)) for hit in refused
    }
    strict = "torchrun" not in result.output  # torchrun prints a traceback of its own
    if not is_clear(list(result.output.values()), reasons, root, strict=strict):
        call = f"{refused[0].op} {refused[0].action} {refused[0].path}"
        problems.append(
            f"no clear error after {call}: {' | '.join(map(last_error, result.output.values()))}"
        )
    return problems


def is_clear(texts: Sequence[str], reasons: set[str], root: str, *, strict: bool) -> bool:
    """Whether an error line names a path below `root` and one of the reasons.

    `strict` also requires that no text has a traceback.
    """
    if strict and any(TRACEBACK in text for text in texts):
        return False
    lines = [line for text in texts for line in error_lines(text)]
    return any(root in line and any(reason in line for reason in reasons) for line in lines)


def error_lines(text: str) -> list[str]:
    """All error lines, and the lines that follow the last one."""
    matches = list(ERROR_LINE.finditer(text))
    return [
        *(match[0] for match in matches),
        *(text[matches[-1].start() :].splitlines() if matches else []),
    ]


def last_error(text: str) -> str:
    lines = ERROR_LINE.findall(text) or [text.strip()[-300:]]
    return ("traceback result in " if TRACEBACK in text else "") + lines[-1][:400]
