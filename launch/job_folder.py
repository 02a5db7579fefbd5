"""Files of a job in RUN/launch: the record of its submission, and what each attempt leaves.

A job that is requeued reads them to decide how to go on; `launch status` prints them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.slurm import JOB_ID
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.atomic import atomic_write, atomic_write_json

HUNG = 76
"""Exit status of a rank that completed no step for long and was killed."""
ATTEMPT_KEYS = {"job", "reason", "requeued"}
"""Keys that every line of attempts.jsonl has."""
NO_RECORD = "left no record: lost with its node, or the disk was full"
EXIT = "exit_{job}_{attempt}_rank_{rank:05d}.json"
STACKS = re.compile(r"_rank_(\d+)_(.+)\.txt$")


@dataclass(frozen=True)
class JobFolder:
    path: Path

    @property
    def run_dir(self) -> Path:
        """Folder of the run, or of the latents, that the job works on."""
        folders = (self.path, *self.path.parents)
        return next(path.parent for path in folders if path.name == "launch")

    @property
    def name(self) -> str:
        """Short name in a table of jobs: the run's, or the path below RUN/launch."""
        if self.path.name == "launch":
            return self.run_dir.name
        return str(self.path.relative_to(self.run_dir / "launch"))

    @property
    def record_file(self) -> Path:
        """Record of the newest submission: job id, command, profile."""
        return self.path / "job.json"

    @property
    def config(self) -> Path:
        """Resolved configuration of the newest submission, which its job uses."""
        return self.path / "config.yaml"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def cancelled(self) -> Path:
        """File that `launch cancel` creates: the job is not requeued while it exists."""
        return self.path / "cancelled"

    @property
    def job(self) -> str | None:
        """Id of the newest job; None where none was submitted, or sbatch refused it.

        Raises ConfigError for text that is no job id, which SLURM's commands could take for an
        option.
        """
        job = self.read_raw_record().get("job") if self.record_file.is_file() else None
        if job is not None and not (isinstance(job, str) and JOB_ID.fullmatch(job)):
            raise ConfigError(
                f"{self.record_file}: job={job!r}: wanted the number of a job, such as 4711 or "
                "4711_0: launch again"
            )
        return job

    def read_raw_record(self) -> dict[str, Any]:
        """Read job.json without checking its values (launch.job.read_record checks them).

        Raises ConfigError where the file is missing or damaged.
        """
        try:
            record = json.loads(self.record_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{self.record_file}: cannot be read ({error}): launch the command again"
            ) from None
        if not isinstance(record, dict):
            raise ConfigError(
                f"{self.record_file}: holds a {type(record).__name__}, wanted a JSON object: "
                "launch the command again"
            )
        return record

    def write_record(self, record: dict[str, Any]) -> None:
        atomic_write_json(self.record_file, record, indent=1)

    def write_config(self, text: str) -> None:
        """Store the configuration of a submission; "" for a command without one."""
        if not text:
            self.config.unlink(missing_ok=True)
            return
        with atomic_write(self.config) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def read_attempts(self) -> list[dict[str, Any]]:
        """Attempts that recorded their end, oldest first; lines that a full disk damaged are
        skipped.
        """
        if not self.attempts.is_file():
            return []
        attempts = []
        for line in self.attempts.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                attempt = json.loads(line)
                if isinstance(attempt, dict) and attempt.keys() >= ATTEMPT_KEYS:
                    attempts.append(attempt)
        return attempts

    def append_attempt(self, attempt: dict[str, Any]) -> None:
        with self.attempts.open("a") as file:
            file.write(json.dumps(attempt) + "\n")

    def write_exit(
        self, job: str, attempt: int, rank: int, status: int, host: str, *, stopped: bool
    ) -> None:
        """Record how a rank exited, for the epilog.

        `stopped`: SLURM had sent a signal.  After a hang the ranks without stacks are recorded too.
        """
        record = {
            "rank": rank,
            "status": status,
            "host": host,
            "stopped": stopped,
            "time_s": time.time(),
        }
        if status == HUNG:
            record["silent_ranks"] = self.silent_ranks(job, attempt)
        atomic_write_json(
            self.path / EXIT.format(job=job, attempt=attempt, rank=rank), record, indent=1
        )

    def exits(self, job: str, attempt: int) -> list[dict[str, Any]]:
        """Exits of the ranks in the order in which they happened; a killed task leaves none."""
        pattern = EXIT.format(job=job, attempt=attempt, rank=0).replace("00000", "*")
        exits = (json.loads(path.read_text()) for path in self.path.glob(pattern))
        return sorted(exits, key=lambda record: record["time_s"])

    def stacks(self, job: str, attempt: int, rank: int, host: str) -> Path:
        """File for the stacks of a training rank's threads, dumped when it hangs; empty before."""
        return self.path / f"stacks_{job}_{attempt}_rank_{rank:05d}_{host}.txt"

    def silent_ranks(self, job: str, attempt: int) -> list[dict[str, Any]]:
        """Rank and host of the training ranks that have dumped no stacks."""
        ranks = []
        for path in sorted(self.path.glob(f"stacks_{job}_{attempt}_rank_*.txt")):
            match = STACKS.search(path.name)
            if match and not path.stat().st_size:
                ranks.append({"rank": int(match[1]), "host": match[2]})
        return ranks

    def remove_empty_stacks(self, job: str) -> None:
        """Remove the stack files of ranks that were killed without a hang, in any attempt."""
        for path in self.path.glob(f"stacks_{job}_*.txt"):
            if not path.stat().st_size:
                path.unlink()

    def rendezvous(self, job: str, attempt: int) -> Path:
        """File in which rank 0 of an attempt publishes its address and port."""
        return self.path / f"rendezvous_{job}_{attempt}.json"

    def last_started_attempt(self, job: str) -> int:
        """Highest attempt whose rank 0 published a rendezvous file; 0 when none did."""
        files = self.path.glob(f"rendezvous_{job}_*.json")
        return max((int(path.stem.rpartition("_")[2]) for path in files), default=0)

    def failed_to_start(self, job: str, attempts: Iterable[int]) -> int:
        """Number of `attempts` that published no rendezvous file."""
        return sum(not self.rendezvous(job, attempt).is_file() for attempt in attempts)

    def history(self, job: str | None) -> list[dict[str, Any]]:
        """All attempts that have ended, oldest first, those that left no record included."""
        attempts = {
            attempt["attempt"]: attempt for attempt in self.read_attempts() if attempt["job"] == job
        }
        for index in range(self.last_started_attempt(job) if job else 0):
            lost = {"job": job, "attempt": index, "reason": NO_RECORD, "requeued": True}
            attempts.setdefault(index, lost)
        return [attempts[index] for index in sorted(attempts)]


def find_job_folders(folder: Path) -> list[JobFolder]:
    """Job folders of a run, of all runs of a sweep, or of all jobs that encode latents.

    `folder` may also be a job folder itself.  Raises ConfigError where nothing was launched.
    """
    own = JobFolder(folder / "launch")
    for single in (own, JobFolder(folder)):
        if single.record_file.is_file():
            return [single]
    records = sorted(folder.glob("*/launch/job.json"))
    if not records:
        encoding = folder.glob("launch/encode/*/job.json")
        numbered = [path for path in encoding if path.parent.name.isdecimal()]
        records = sorted(numbered, key=lambda path: int(path.parent.name))
    if not records:
        raise ConfigError(f"{own.record_file}: not there: nothing was launched for this run")
    return [JobFolder(path.parent) for path in records]


def single_job_folder(run: Path) -> JobFolder:
    """The only job folder of `run`.  Raises ConfigError where there are several jobs, or none."""
    folders = find_job_folders(run)
    if len(folders) > 1:
        raise ConfigError(
            f"{run}: holds {len(folders)} jobs: name one of them, such as {folders[0].path}"
        )
    return folders[0]
