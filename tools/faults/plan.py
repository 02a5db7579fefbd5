"""Draws the faults of one attempt: file faults from the calls that an undisturbed run made, and
signals at random times.

Every draw is a function of (seed, series, iteration, attempt).
"""

from __future__ import annotations

import errno
import random
import re
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

Trace = Sequence[tuple[int, str, str]]
"""(rank, operation, path) of the calls below the root that an undisturbed run made."""

TRANSIENT = (errno.EIO, errno.ESTALE)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
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
    "create": (errno.EIO, *NO_ROOM),
    "mkdir": (errno.EIO, *NO_ROOM),
    "link": (errno.EIO, *NO_ROOM),
    "truncate": (errno.EIO, *NO_ROOM),
    "write": (errno.EIO, *NO_ROOM),
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
"""How often an operation is chosen, against the others."""
INTERRUPTED = ("read", "write", "open", "create", "fsync")
TAKES_ROOM = ("write", "create", "mkdir", "link", "truncate")
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
    """0: that call and all later ones."""

    def entry(self, number: int) -> str:
        """For LPL_CHAOS_PLAN (layer.c)."""
        words = (number, self.rank, self.op, self.action, self.nth, self.times, self.match)
        return " ".join(map(str, words))


@dataclass(frozen=True)
class SignalFault:
    """A signal to one rank, or to all of them (`rank` None), after a fraction of an undisturbed
    run's time.
    """

    kind: str
    rank: int | None
    number: int
    at: float
    resume_s: float | None = None
    """Of SIGSTOP: SIGCONT comes so much later."""


@dataclass(frozen=True)
class LostLease:
    """All ranks are suspended, their lease expires, the command is started again, and then they go
    on.
    """

    at: float
    resume_s: float
    kind: str = "lease lost"


Fault = FileFault | SignalFault | LostLease


def generator(seed: int, series: str, iteration: int, attempt: int) -> random.Random:
    return random.Random(f"{seed}/{series}/{iteration}/{attempt}")


def draw(rng: random.Random, trace: Trace, ranks: int, *, leased: bool) -> list[Fault]:
    """One fault that an attempt rarely survives, preceded by up to four that it must not even
    notice.
    """
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
        ops = {op: weight for op, weight in WRITES.items() if op in TAKES_ROOM}
        return [*faults, _at_call(rng, trace, rank, "disk full", ops, "full")]
    times = 1 if kind == "error" else 0
    return [*faults, _at_call(rng, trace, rank, "", {**WRITES, **READS}, None, times)]


def _survivable(rng: random.Random, trace: Trace, ranks: int) -> Fault:
    rank, kind = (
        rng.randrange(ranks),
        rng.choice(("stop", "stop at call", "short read", "short write", "EINTR")),
    )
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
    """`action` None: one of the operation's errors, which is the fault's kind as well."""
    mine = [(op, path) for of, op, path in trace if of == rank]
    ops = sorted({op for op, _ in mine} & weights.keys())
    if not ops:
        return FileFault(kind or "EIO", rank, "write", action or str(errno.EIO), 1, "*", times)
    op = rng.choices(ops, [weights[op] for op in ops])[0]
    match = rng.choice(sorted({constant_part(path) for of, path in mine if of == op}))
    calls = sum(of == op and match in path for of, path in mine)
    nth = 1 + int(
        calls * min(rng.random(), rng.random())
    )  # rather early: a start that goes on makes fewer calls
    if action is None:
        error = rng.choice(ERRORS[op])
        action, kind = str(error), errno.errorcode[error]
    return FileFault(kind, rank, op, action, nth, match, times)


def constant_part(path: str) -> str:
    """The longest part of a file's name that is the same in every run and for every step, shard and
    rank.
    """
    parts = [part for part in VARIABLE.split(PurePosixPath(path).name) if part]
    return max(parts, key=len, default="*").replace(" ", "_")[:79] if parts else "*"


def count_kinds(faults: Sequence[Fault]) -> Counter[str]:
    return Counter(fault.kind for fault in faults)
