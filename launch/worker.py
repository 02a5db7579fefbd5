"""The process of each task of a job: runs `lpl-pretrain ...` as a child that knows its rank.

A child, because SLURM's signals arrive at any time: before a handler is installed, inside a
collective, while compiling.  The worker only waits, so it can always forward them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from launch.job_folder import HUNG, JobFolder
from launch.rendezvous import rendezvous_env
from launch.signals import SignalForwarder
from launch.slurm import current_job_id, node_name, restart_count
from lpl_pretrain.errors import BAD_INPUT
from lpl_pretrain.runtime.source_hash import source_hash

STACKS_POLL_S = 1.0
"""Interval between checks whether a rank has dumped its stacks, which it does when it hangs."""
GRACE_S = 5.0
"""Time between the dump and the kill, in which all other ranks dump theirs."""


@dataclass(frozen=True)
class Allocation:
    """SLURM's numbers for this task, from srun's environment."""

    job: str
    attempt: int
    """0, and one more after every requeue."""
    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> Allocation:
        return cls(
            job=current_job_id(),
            attempt=restart_count(),
            rank=int(os.environ["SLURM_PROCID"]),
            local_rank=int(os.environ["SLURM_LOCALID"]),
            world_size=int(os.environ["SLURM_NTASKS"]),
        )


@dataclass
class Worker:
    """Callable that submitit pickles at submission and calls in every task."""

    argv: list[str]
    """Arguments of `module`."""
    folder: str
    """Job folder, on a file system that all nodes share."""
    prefix: list[str] = field(default_factory=list)
    """Command that runs Python, such as a container's."""
    code: str = ""
    """Fingerprint of this package at submission."""
    on_changed_code: str = "warn"
    module: str = "lpl_pretrain"
    """Module that the child runs with `python -m`."""
    kill_on_hang: bool = False
    """Kill a child that hangs, once it has dumped its stacks."""
    split: tuple[int, int] = (0, 1)
    """(index, number) of the jobs whose tasks count as one world; they need not run together."""
    cwd: str = ""
    """Working directory, from which the job was submitted."""

    def __call__(self) -> int:
        """Run the child and exit with its status; 0 if a signal stopped it before it listened."""
        signals = SignalForwarder()
        task = Allocation.from_environment()
        folder = JobFolder(Path(self.folder))
        host = node_name()
        if (problem := self._enter(host)) is not None:
            print(f"launch: {problem}", flush=True)
            folder.write_exit(task.job, task.attempt, task.rank, BAD_INPUT, host, stopped=False)
            sys.exit(BAD_INPUT)
        stacks = folder.stacks(task.job, task.attempt, task.rank, host)
        rendezvous = folder.rendezvous(task.job, task.attempt)
        environment = {
            **os.environ,
            **rendezvous_env(rendezvous, task.rank, lambda: bool(signals.received)),
            **self.rank_env(task),
            "LPL_STACKS_FILE": str(stacks),
        }
        status = 0
        if not signals.received:
            command = [*self.prefix, sys.executable, "-m", self.module, *self.argv]
            child = subprocess.Popen(command, env=environment)
            signals.forward_to(child)
            status = wait_or_kill_hung(child, stacks) if self.kill_on_hang else child.wait()
        if signals.received and status in (-signals.received, 128 + signals.received):
            status = 0
        stopped = bool(signals.received)
        folder.write_exit(task.job, task.attempt, task.rank, status, host, stopped=stopped)
        if status:
            sys.exit(status if status > 0 else 128 - status)
        return status

    def _enter(self, host: str) -> str | None:
        """Change to the working directory and compare the code; the reason why the task cannot run,
        or None.
        """
        try:
            os.chdir(self.cwd or os.curdir)
        except OSError as error:  # SLURM itself would go on in another folder
            return f"{host} does not see {self.cwd!r}, where the job was submitted: {error}"
        if (now := source_hash()) == self.code:
            return None
        changed = (
            f"the code has changed since this job was submitted ({self.code[:12]} then, "
            f"{now[:12]} now)"
        )
        if self.on_changed_code == "refuse":
            return changed
        print(f"launch: {changed}", flush=True)
        return None

    def rank_env(self, task: Allocation) -> dict[str, str]:
        """RANK, LOCAL_RANK and WORLD_SIZE, over all jobs of a split."""
        index, jobs = self.split
        return {
            "RANK": str(index * task.world_size + task.rank),
            "LOCAL_RANK": str(task.local_rank),
            "WORLD_SIZE": str(jobs * task.world_size),
        }


def wait_or_kill_hung(child: subprocess.Popen[bytes], stacks: Path) -> int:
    """Wait for the child and return its exit status.

    A child that dumps its stacks (lpl_pretrain/runtime/watchdog.py) is killed GRACE_S later: HUNG,
    or 0 if it has succeeded by then.
    """
    while not (stacks.is_file() and stacks.stat().st_size):
        with suppress(subprocess.TimeoutExpired):
            return child.wait(STACKS_POLL_S)
    print(
        f"launch: no step for long: killed in {GRACE_S:.0f} s; stacks of its threads: {stacks}",
        flush=True,
    )
    time.sleep(GRACE_S)
    child.kill()
    return HUNG if child.wait() else 0
