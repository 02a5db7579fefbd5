"""One start of a job, disturbed as planned, until it has ended; and what its ending was like."""

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

POLL_S, RESUME_S = 0.01, 0.3
HANGS_S, GIVES_WAY_S = 240.0, 60.0
ERROR_LINE = re.compile(r"\b\w*Error: .*$", re.MULTILINE)
TRACEBACK = "Traceback (most recent call last)"


@dataclass
class Ending:
    statuses: list[int]
    output: dict[str, str]
    hits: list[Hit]
    happened: list[Fault]
    """Faults that met a living process."""
    seconds: float
    problems: list[str] = field(default_factory=list)

    @property
    def well(self) -> bool:
        return not any(self.statuses)

    def count(self) -> Counter[str]:
        return Counter(fault.kind for fault in self.happened)


class Attempt:
    """`plan` happens to `ranks`; `seconds` is how long an undisturbed start takes."""

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

    def run(self, look: Callable[[], None] = lambda: None) -> Ending:
        """`look` is called when all has ended and what the layer has noted is still there."""
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
            if deadline is None and self.ranks.meet and self.ranks.failed():
                deadline = now + GRACE_S
            if deadline is not None and now > deadline:
                self.ranks.end()
            if now - self.started > HANGS_S + 10 * self.seconds:
                self.problems.append(f"hangs: no end after {now - self.started:.0f} s")
                self.ranks.end()
            time.sleep(POLL_S)
        statuses, seconds = self.ranks.statuses(), time.monotonic() - self.started
        hits = self.layer.hits()
        look()
        self.layer.clear()
        numbers = {hit.number for hit in hits}
        self.happened += [
            fault for number, fault in enumerate(self.files, start=1) if number in numbers
        ]
        ending = Ending(statuses, self.ranks.output(), hits, self.happened, seconds, self.problems)
        ending.problems += [*error_problems(ending, str(self.layer.root))]
        return ending

    def _signal(self, passed: float) -> None:
        while self.signals and passed > self.signals[0].at * self.seconds:
            fault = self.signals.pop(0)
            if met := self.ranks.send(fault.number, fault.rank):
                self.happened.append(fault)
            if fault.resume_s is not None:
                self._resume += [(time.monotonic() + fault.resume_s, pid) for pid in met]

    def _continue(self, now: float) -> None:
        """Wakes what was stopped, by us or by the file layer."""
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
        """The suspended ranks must end by themselves once they go on; those started meanwhile take
        their place.
        """
        self.lost = None
        if (
            self.lease is None
            or not self.lease.exists()
            or not (before := self.ranks.send(signal.SIGSTOP))
        ):
            return
        old, long_ago = self.ranks, time.time() - 3600
        with suppress(FileNotFoundError):
            os.utime(self.lease, (long_ago, long_ago))
        self.happened.append(fault)
        self.ranks = Ranks(
            old.command,
            old.count,
            {**old.environment, "LPL_CHAOS_PLAN": ""},
            old.logs / "heir",
            old.mark,
            meet=old.meet,
        )
        held = read_lease(self.lease)
        self.ranks.start()
        while (
            read_lease(self.lease) == held and self.ranks.running()
        ):  # else it is still theirs when they go on
            time.sleep(POLL_S)
        time.sleep(fault.resume_s)
        deadline = time.monotonic() + GIVES_WAY_S
        for pid in before:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        while old.running() and not old.failed() and (now := time.monotonic()) < deadline:
            self._continue(now)
            time.sleep(POLL_S)
        if old.running() and not old.failed():
            self.problems.append(f"went on for {GIVES_WAY_S:.0f} s without its lease")
        for process in old.processes:
            with suppress(Exception):
                process.wait(GRACE_S)
        for pid in before:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if old.statuses()[0] == 0:
            self.problems.append("ended well without its lease")


def error_problems(ending: Ending, root: str) -> list[str]:
    """An input or output error that ends a process is told in a line: our error, the path, the
    reason; and may be tried again.
    """
    problems = []
    if BAD_INPUT in ending.statuses:
        told = next((text for text in ending.output.values() if ERROR_LINE.search(text)), "")
        problems.append(f"exit status {BAD_INPUT}, which means bad input: {last_error(told)}")
    kinds = {
        hit.number: hit for hit in ending.hits if hit.action.isdigit() or hit.number == FULL_DISK
    }
    refused = [hit for hit in kinds.values() if hit.action != str(errno.EINTR)]
    killed = any(status < 0 for status in ending.statuses)
    if (
        ending.well
        or not refused
        or killed
        or any(isinstance(f, LostLease) for f in ending.happened)
    ):
        return problems
    reasons = {
        os.strerror(errno.ENOSPC if hit.action == "full" else int(hit.action)) for hit in refused
    }
    strict = "torchrun" not in ending.output  # whose own traceback follows ours
    if not is_clear(list(ending.output.values()), reasons, root, strict=strict):
        where = f"{refused[0].op} {refused[0].action} {refused[0].path}"
        problems.append(
            f"no clear error after {where}: {' | '.join(map(last_error, ending.output.values()))}"
        )
    return problems


def is_clear(texts: Sequence[str], reasons: set[str], root: str, *, strict: bool) -> bool:
    """The last error of a rank names a path below `root` and one of the reasons in a line;
    `strict`: and none has a traceback.
    """
    if strict and any(TRACEBACK in text for text in texts):
        return False
    lines = [line for text in texts for line in error_lines(text)]
    return any(root in line and any(reason in line for reason in reasons) for line in lines)


def error_lines(text: str) -> list[str]:
    """Every error, and the lines that follow the last one."""
    found = list(ERROR_LINE.finditer(text))
    return [
        *(match[0] for match in found),
        *(text[found[-1].start() :].splitlines() if found else []),
    ]


def last_error(text: str) -> str:
    lines = ERROR_LINE.findall(text) or [text.strip()[-300:]]
    return ("traceback ending in " if TRACEBACK in text else "") + lines[-1][:400]
