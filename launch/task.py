"""What every process of a job runs: `lpl-pretrain ...` as a child that knows its rank and is told
of the scheduler's signals.

A child, because a scheduler's signals come whenever they like: before there is a handler, inside a
collective, while compiling. This process has nothing else to do than to pass them on.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.folder import HUNG, JobFolder, current_job_id, write_json
from lpl_pretrain.errors import BAD_INPUT
from lpl_pretrain.runtime.source_hash import fingerprint

WAIT_S, POLL_S = 300.0, 0.2
STACKS_POLL_S, GRACE_S = 1.0, 5.0
"""Between looks for the stacks of a rank that hangs; and from there to its end, so that all ranks
have written theirs.
"""
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""Passed on to the child.  SIGINT is not: the scheduler gives it to all processes of a step, and a
second one would be taken for another Ctrl-C.
"""


@dataclass(frozen=True)
class Allocation:
    """Of this process, as srun's environment has it."""

    job: str
    attempt: int
    """0, and one more after every requeue."""
    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> Allocation:
        numbers = (
            int(os.environ[name]) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
        )
        return cls(current_job_id(), int(os.environ.get("SLURM_RESTART_COUNT", "0")), *numbers)


@dataclass
class Task:
    argv: list[str]
    """Behind `lpl-pretrain`."""
    folder: str
    """RUN/launch, which all nodes see."""
    prefix: list[str] = field(default_factory=list)
    """What the command is run by."""
    code: str = ""
    """Fingerprint of this package at submission."""
    on_changed_code: str = "warn"
    module: str = "lpl_pretrain"
    """What Python is told to run."""
    kill_on_hang: bool = False
    """Kill a child that hangs, once it has written its stacks."""
    split: tuple[int, int] = (0, 1)
    """Which job this is of how many whose children count as one world: they need not meet."""
    cwd: str = ""
    """Where relative paths begin: the folder of the submission; "" in a job of an older version."""

    def __call__(self) -> int:
        """Ends with the child's exit status; 0 also for one that a signal met before it could
        listen.
        """
        stop = SignalForwarder()
        here, folder, host = (
            Allocation.from_environment(),
            JobFolder(Path(self.folder)),
            node_name(),
        )
        try:
            os.chdir(self.cwd or os.curdir)
        except OSError as problem:  # the scheduler would go on in another folder
            print(
                f"launch: {host} does not see {self.cwd!r}, where the job was submitted: {problem}",
                flush=True,
            )
            folder.write_exit(here.job, here.attempt, here.rank, BAD_INPUT, host, stopped=False)
            sys.exit(BAD_INPUT)
        if (now := fingerprint()) != self.code:
            print(
                f"launch: the code has changed since this job was submitted ({self.code[:12]} "
                f"then, {now[:12]} now)",
                flush=True,
            )
            if self.on_changed_code == "refuse":
                folder.write_exit(here.job, here.attempt, here.rank, BAD_INPUT, host, stopped=False)
                sys.exit(BAD_INPUT)
        stacks = folder.stacks(here.job, here.attempt, here.rank, host)
        environment = {
            **os.environ,
            **rendezvous(here, folder, stop),
            **self.rank_env(here),
            "LPL_STACKS_FILE": str(stacks),
        }
        status = 0
        if not stop.asked:
            child = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", self.module, *self.argv], env=environment
            )
            stop.forward_to(child)
            status = wait_or_kill(child, stacks) if self.kill_on_hang else child.wait()
        if stop.asked and status in (-stop.asked, 128 + stop.asked):
            status = 0
        folder.write_exit(here.job, here.attempt, here.rank, status, host, stopped=bool(stop.asked))
        if status:
            sys.exit(status if status > 0 else 128 - status)
        return status

    def rank_env(self, here: Allocation) -> dict[str, str]:
        number, of = self.split
        rank, world_size = number * here.world_size + here.rank, of * here.world_size
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(here.local_rank),
            "WORLD_SIZE": str(world_size),
        }


def wait_or_kill(child: subprocess.Popen[bytes], stacks: Path) -> int:
    """The child's exit status; or HUNG, when it has written its stacks and did not end well a
    moment later.
    """
    while not (stacks.is_file() and stacks.stat().st_size):
        with suppress(subprocess.TimeoutExpired):
            return child.wait(STACKS_POLL_S)
    print(
        f"launch: no step for long: killed in {GRACE_S:.0f} s; what its threads were "
        f"doing: {stacks}",
        flush=True,
    )
    time.sleep(GRACE_S)
    child.kill()
    return HUNG if child.wait() else 0


class SignalForwarder:
    """Notes the scheduler's signals from now on, and passes them on once there is a child."""

    def __init__(self) -> None:
        self.asked = self._to_pass_on = 0
        self._child: subprocess.Popen[bytes] | None = None
        for number in (*SIGNALS, signal.SIGINT):
            signal.signal(number, self._note)

    def forward_to(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        if self._to_pass_on:
            child.send_signal(self._to_pass_on)

    def _note(self, number: int, frame: object) -> None:
        self.asked = self.asked or number
        if number in SIGNALS and not self._to_pass_on:
            self._to_pass_on = number
            if self._child is not None:
                self._child.send_signal(number)


def node_name() -> str:
    """As the scheduler calls this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def rendezvous(here: Allocation, folder: JobFolder, stop: SignalForwarder) -> dict[str, str]:
    """Variables by which the ranks find each other: rank 0 publishes a port that was free a moment
    ago.
    """
    path = folder.rendezvous(here.job, here.attempt)
    if here.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            write_json(path, {"address": node_name(), "port": probe.getsockname()[1]})
    deadline = time.monotonic() + WAIT_S
    while not path.is_file() and not stop.asked:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{path}: rank 0 has not said where it is in {WAIT_S:.0f} s; does every node see "
                "this folder?"
            )
        time.sleep(POLL_S)
    where: dict[str, Any] = (
        json.loads(path.read_text()) if path.is_file() else {"address": "", "port": 0}
    )
    return {"MASTER_ADDR": where["address"], "MASTER_PORT": str(where["port"])}
