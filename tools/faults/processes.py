"""Processes of one attempt: started as torchrun starts them, signalled, and found by a mark."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import fork_server

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 8.0
"""Seconds from the failure of a rank to the end of the others, which may wait for it."""
MARK = "LPL_CHAOS"


@dataclass
class Ranks:
    """One start of a command on `count` processes.

    `mark` occurs in their command lines or environments and in those of no other process.
    """

    command: Sequence[str]
    count: int
    environment: dict[str, str]
    logs: Path
    mark: str
    cold: bool = False
    torchrun: bool = False
    communicate: bool = True
    """Whether ranks communicate; if so, the failure of one ends the others."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        python = [*([] if self.cold else fork_server.command_prefix()), sys.executable, "-m"]
        shared = {
            **os.environ,
            **self.environment,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            MARK: self.mark,
        }
        if self.torchrun:
            agent = [
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={self.count}",
                "--no-python",
            ]
            self._popen([*python, *agent, *python, *self.command], shared, "torchrun")
            return
        port = free_port()
        for rank in range(self.count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.count)}
            rank_env = (
                {**own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                if self.count > 1
                else {}
            )
            self._popen([*python, *self.command], {**shared, **rank_env}, f"rank_{rank}")

    def _popen(self, command: list[str], environment: dict[str, str], name: str) -> None:
        with (self.logs / f"{name}.txt").open("wb") as log:
            self.processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            )

    def pids(self, rank: int | None = None) -> list[int]:
        """Process ids of one rank or all, without torchrun, fork server clients and supervisors."""
        pids = []
        for pid, line, environ in processes_of(self.mark):
            if "torch.distributed.run" in line or fork_server.__file__ in line:
                continue
            own = line if line.startswith("RANK=") else environ
            own_rank = next(
                (word for word in own.replace("\0", " ").split() if word.startswith("RANK=")),
                "RANK=0",
            )
            if "lpl_pretrain" in line or "launch" in line or self.command[0] in line:
                pids += [pid] if rank is None or own_rank == f"RANK={rank}" else []
        return pids

    def send(self, number: int, rank: int | None = None) -> list[int]:
        """Send a signal; the ids of the processes that received it."""
        signalled = []
        for pid in self.pids(rank):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
                signalled.append(pid)
        return signalled

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def failed(self) -> bool:
        return any(process.poll() not in (None, 0) for process in self.processes)

    def statuses(self) -> list[int]:
        return [process.wait() for process in self.processes]

    def end(self) -> None:
        """Kill all processes at once."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)
            if process.poll() is None:
                process.kill()
        self.statuses()

    def output(self) -> dict[str, str]:
        return {
            path.stem: path.read_text(errors="replace") for path in sorted(self.logs.glob("*.txt"))
        }


def processes_of(mark: str) -> list[tuple[int, str, str]]:
    """(pid, command line, environment) of all processes with the mark, except zombies."""
    marked = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with suppress(OSError):
            line = (folder / "cmdline").read_bytes().decode(errors="replace")
            environ = (folder / "environ").read_bytes().decode(errors="replace")
            if line and (mark in line or f"{MARK}={mark}\0" in environ):
                marked.append((int(folder.name), line.replace("\0", " "), environ))
    return marked


def orphans(mark: str, wait_s: float = 5.0) -> list[str]:
    """Command lines of processes that are still alive `wait_s` after their command ended."""
    deadline = time.monotonic() + wait_s
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [f"{pid} {line[:200]}" for pid, line, _ in left]


def is_stopped(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def free_port() -> int:
    """Free port below the ephemeral range, which the system assigns to no other process."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
