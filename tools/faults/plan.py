"""Draws the faults of one attempt: file faults and signals.

File faults hit calls that an undisturbed run made; signals come at random times.  Every draw is a
function of (seed, series, iteration, attempt).
"""

from __future__ import annotations

import errno
import random
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

Trace = Sequence[tuple[int, str, str]]
"""(rank, operation, path) of the calls below the root that an undisturbed run made."""

TRANSIENT = (errno.EIO, errno.ESTALE)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
ERRORS = {
    "open": TRANSIENT,
    "reopen": TRANSIENT,
    "read": TRANSIENT,
    "stat": TRANSIENT,
    "list": TRANSIENT,
    "touch": TRANSIENT,
    "unlink": TRANSIENT,
    "close": (errno.EIO, errno.ENOSPC),
    "fsync": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EIO, errno.ENOSPC),
    "create": (errno.EIO, *NO_SPACE),
    "mkdir": (errno.EIO, *NO_SPACE),
    "link": (errno.EIO, *NO_SPACE),
    "truncate": (errno.EIO, *NO_SPACE),
    "write": (errno.EIO, *NO_SPACE),
}
WRITES = {
    "write": 6,
    "create": 3,
    "fsync": 2,
    "rename": 3,
    "close": 1,
    "mkdir": 1,
    "link": 1,
    "unlink": 1,
    "touch": 1,
}
READS = {"read": 3, "open": 2, "reopen": 1, "stat": 1, "list": 1}
"""WRITES and READS: relative frequency of each operation."""
INTERRUPTED = ("read", "write", "open", "create", "fsync")
ALLOCATES = ("write", "create", "mkdir", "link", "truncate")
VARIABLE = re.compile(r"[0-9a-f]{8,}|\d+")


@dataclass(frozen=True)
class FileFault:
    """Call number `nth` of `op`, on a path that contains `match`, in the process of `rank`."""

    kind: str
    rank: int
    op: str
    action: str
    nth: int
    match: str
    times: int = 1
    """Number of consecutive calls that fail; 0 is that call and all later ones."""

    def entry(self, number: int) -> str:
        """This fault in the format of LPL_CHAOS_PLAN (layer.c)."""
        words = (number, self.rank, self.op, self.action, self.nth, self.times, self.match)
        return " ".join(map(str, words))


@dataclass(frozen=True)
class SignalFault:
    """Signal to one rank, or to all (`rank` None).

    `at` is a fraction of the seconds of an undisturbed run.
    """

    kind: str
    rank: int | None
    number: int
    at: float
    resume_s: float | None = None
    """Seconds from SIGSTOP to SIGCONT."""


@dataclass(frozen=True)
class LostLease:
    """All ranks are suspended, their lease expires, the command starts again, then they resume."""

    at: float
    resume_s: float
    kind: str = "lease lost"


Fault = FileFault | SignalFault | LostLease


def generator(seed: int, series: str, iteration: int, attempt: int) -> random.Random:
    return random.Random(f"{seed}/{series}/{iteration}/{attempt}")


def draw(rng: random.Random, trace: Trace, ranks: int, *, leased: bool) -> list[Fault]:
    """Draw up to four faults that an attempt must survive, then one that it rarely survives."""
    faults: list[Fault] = [_survivable(rng, trace, ranks) for _ in range(rng.randint(0, 4))]
    kinds = {
        "kill": 5,
        "kill all": 2,
        "kill at call": 5,
        "term": 1,
        "error": 9,
        "persistent": 3,
        "full": 4,
    }
    kinds["lease lost"] = 1 if leased else 0
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    rank, at = rng.randrange(ranks), rng.random()
    if kind == "kill":
        return [*faults, SignalFault("SIGKILL", rank, signal.SIGKILL, at)]
    if kind == "kill all":
        return [*faults, SignalFault("SIGKILL", None, signal.SIGKILL, at)]
    if kind == "term":
        return [*faults, SignalFault("SIGTERM", None, signal.SIGTERM, at)]
    if kind == "lease lost":
        return [*faults, LostLease(0.3 + 0.7 * at, rng.uniform(0.5, 3.0))]
    if kind == "kill at call":
        return [*faults, _at_call(rng, trace, rank, "SIGKILL", WRITES, "kill")]
    if kind == "full":
        ops = {op: weight for op, weight in WRITES.items() if op in ALLOCATES}
        return [*faults, _at_call(rng, trace, rank, "disk full", ops, "full")]
    times = 1 if kind == "error" else 0
    return [*faults, _at_call(rng, trace, rank, "", {**WRITES, **READS}, None, times)]


def _survivable(rng: random.Random, trace: Trace, ranks: int) -> Fault:
    rank = rng.randrange(ranks)
    kind = rng.choice(("stop", "stop at call", "short read", "short write", "EINTR"))
    if kind == "stop":
        return SignalFault("SIGSTOP", rank, signal.SIGSTOP, rng.random(), rng.uniform(0.1, 1.0))
    if kind == "stop at call":
        return _at_call(rng, trace, rank, "SIGSTOP", WRITES, "stop")
    if kind == "EINTR":
        return _at_call(rng, trace, rank, "EINTR", dict.fromkeys(INTERRUPTED, 1), str(errno.EINTR))
    return _at_call(rng, trace, rank, kind, {kind.split()[1]: 1}, "short")


def _at_call(
    rng: random.Random,
    trace: Trace,
    rank: int,
    kind: str,
    weights: dict[str, int],
    action: str | None,
    times: int = 1,
) -> FileFault:
    """Draw a call of `rank`, weighted by operation, and its fault.

    If `action` is None, an error of the operation is drawn, which also names the fault's kind.
    """
    calls_of_rank = [(op, path) for of, op, path in trace if of == rank]
    ops = sorted({op for op, _ in calls_of_rank} & weights.keys())
    if not ops:
        return FileFault(kind or "EIO", rank, "write", action or str(errno.EIO), 1, "*", times)
    op = rng.choices(ops, [weights[op] for op in ops])[0]
    match = rng.choice(sorted({constant_part(path) for of, path in calls_of_rank if of == op}))
    calls = sum(of == op and match in path for of, path in calls_of_rank)
    # biased to early calls, because a resumed start makes fewer of them
    nth = 1 + int(calls * min(rng.random(), rng.random()))
    if action is None:
        error = rng.choice(ERRORS[op])
        action, kind = str(error), errno.errorcode[error]
    return FileFault(kind, rank, op, action, nth, match, times)


def constant_part(path: str) -> str:
    """Longest part of a file's name without hexadecimal ids and numbers of steps, shards, ranks."""
    parts = [part for part in VARIABLE.split(PurePosixPath(path).name) if part]
    return max(parts, key=len, default="*").replace(" ", "_")[:79] if parts else "*"
