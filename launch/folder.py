"""What a job leaves in RUN/launch, for itself after a requeue and for people: names, times and
exits of every attempt.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.atomic import atomic_write

HUNG = 76
"""Exit status of a task whose child made no step for long and was killed."""
ATTEMPT = {"job", "reason", "requeued"}
"""What every line of attempts.jsonl has."""
NO_RECORD = "left no word: lost with its node, or no room on the disk"
EXIT = "exit_{job}_{attempt}_rank_{rank:05d}.json"
JOB = re.compile(r"[0-9]+(_[0-9]+)?")
"""A job as the scheduler names it, or a task of an array."""
STACKS = re.compile(r"_rank_(\d+)_(.+)\.txt$")


@dataclass(frozen=True)
class JobFolder:
    path: Path

    @property
    def run_dir(self) -> Path:
        """That it is in: of a run, or of latents."""
        return next(
            path.parent for path in (self.path, *self.path.parents) if path.name == "launch"
        )

    @property
    def name(self) -> str:
        """Tells it from others that were launched with it."""
        return (
            self.run_dir.name
            if self.path.name == "launch"
            else str(self.path.relative_to(self.run_dir / "launch"))
        )

    @property
    def record_file(self) -> Path:
        """Of the newest submission: job, command, profile."""
        return self.path / "job.json"

    @property
    def config(self) -> Path:
        """The resolved configuration of the newest submission, which its job uses."""
        return self.path / "config.yaml"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def cancelled(self) -> Path:
        """Is there once `launch cancel` was asked for: then nothing goes on by itself."""
        return self.path / "cancelled"

    @property
    def job(self) -> str | None:
        """The newest; None where there is none, or the scheduler has not taken it.  Raises
        ConfigError.

        Only a job's number is passed on to the scheduler's commands, which would take other text
        for options.
        """
        job = self.read_raw_record().get("job") if self.record_file.is_file() else None
        if job is not None and not (isinstance(job, str) and JOB.fullmatch(job)):
            raise ConfigError(
                f"{self.record_file}: job={job!r}: wanted the number of a job, such as 4711 or 4711_0: "
                "launch again"
            )
        return job

    def read_raw_record(self) -> dict[str, Any]:
        """Raises ConfigError where the file is missing or damaged."""
        try:
            record = json.loads(self.record_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as problem:
            raise ConfigError(
                f"{self.record_file}: cannot be read ({problem}): launch the command again"
            ) from None
        if not isinstance(record, dict):
            raise ConfigError(
                f"{self.record_file}: holds a {type(record).__name__}, wanted a JSON object: launch the "
                "command again"
            )
        return record

    def write_record(self, record: dict[str, Any]) -> None:
        write_json(self.record_file, record)

    def write_config(self, text: str) -> None:
        """Keep the configuration of a submission; "" for a command without one."""
        if not text:
            self.config.unlink(missing_ok=True)
            return
        with atomic_write(self.config) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def read_attempts(self) -> list[dict[str, Any]]:
        """Without lines that are damaged, as a full disk leaves them."""
        if not self.attempts.is_file():
            return []
        found = []
        for line in self.attempts.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                attempt = json.loads(line)
                if isinstance(attempt, dict) and attempt.keys() >= ATTEMPT:
                    found.append(attempt)
        return found

    def append_attempt(self, attempt: dict[str, Any]) -> None:
        with self.attempts.open("a") as file:
            file.write(json.dumps(attempt) + "\n")

    def write_exit(
        self, job: str, attempt: int, rank: int, status: int, host: str, *, stopped: bool
    ) -> None:
        """`stopped`: the scheduler had asked for it.  Of a hang also the ranks that are silent now."""
        found = {
            "rank": rank,
            "status": status,
            "host": host,
            "stopped": stopped,
            "time_s": time.time(),
        }
        if status == HUNG:
            found["silent_ranks"] = self.silent_ranks(job, attempt)
        write_json(self.path / EXIT.format(job=job, attempt=attempt, rank=rank), found)

    def exits(self, job: str, attempt: int) -> list[dict[str, Any]]:
        """Of the ranks that came to one, the first one first."""
        pattern = EXIT.format(job=job, attempt=attempt, rank=0).replace("00000", "*")
        return sorted(
            (json.loads(path.read_text()) for path in self.path.glob(pattern)),
            key=lambda found: found["time_s"],
        )

    def stacks(self, job: str, attempt: int, rank: int, host: str) -> Path:
        """Where a rank in training writes what its threads do when it hangs; until then the file is
        there and empty.
        """
        return self.path / f"stacks_{job}_{attempt}_rank_{rank:05d}_{host}.txt"

    def silent_ranks(self, job: str, attempt: int) -> list[dict[str, Any]]:
        """Rank and host of those in training that have written no stacks."""
        found = [
            (STACKS.search(path.name), path)
            for path in sorted(self.path.glob(f"stacks_{job}_{attempt}_rank_*.txt"))
        ]
        return [
            {"rank": int(name[1]), "host": name[2]}
            for name, path in found
            if name and not path.stat().st_size
        ]

    def drop_empty_stacks(self, job: str) -> None:
        """Of ranks that were killed without having hung, in any attempt."""
        for path in self.path.glob(f"stacks_{job}_*.txt"):
            if not path.stat().st_size:
                path.unlink()

    def rendezvous(self, job: str, attempt: int) -> Path:
        """Where rank 0 of an attempt says how it is reached."""
        return self.path / f"rendezvous_{job}_{attempt}.json"

    def last_started_attempt(self, job: str) -> int:
        """That began, which its rank 0 has said."""
        found = self.path.glob(f"rendezvous_{job}_*.json")
        return max((int(path.stem.rpartition("_")[2]) for path in found), default=0)

    def failed_to_start(self, job: str, attempts: Iterable[int]) -> int:
        """How many of them did not begin."""
        return sum(not self.rendezvous(job, attempt).is_file() for attempt in attempts)

    def history(self, job: str | None) -> list[dict[str, Any]]:
        """All attempts that have ended, the oldest first: also those that left no word."""
        noted = {
            attempt["attempt"]: attempt for attempt in self.read_attempts() if attempt["job"] == job
        }
        for attempt in range(self.last_started_attempt(job) if job else 0):
            noted.setdefault(
                attempt, {"job": job, "attempt": attempt, "reason": NO_RECORD, "requeued": True}
            )
        return [noted[attempt] for attempt in sorted(noted)]


def current_job_id() -> str:
    """Its name, as squeue, scancel and scontrol take it; that of one task where it belongs to an
    array (array.py says why).
    """
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return (
        os.environ["SLURM_JOB_ID"] if task is None else f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    )


def find_job_folders(folder: Path) -> list[JobFolder]:
    """Of the run that lies in `folder`, of the runs of a sweep, of the jobs that encode latents; or
    a job's folder itself.

    Raises ConfigError where nothing was launched.
    """
    own = JobFolder(folder / "launch")
    for only in (own, JobFolder(folder)):
        if only.record_file.is_file():
            return [only]
    numbered = [
        path for path in folder.glob("launch/encode/*/job.json") if path.parent.name.isdecimal()
    ]
    encoding = sorted(numbered, key=lambda path: int(path.parent.name))
    found = sorted(folder.glob("*/launch/job.json")) or encoding
    if not found:
        raise ConfigError(f"{own.record_file}: not there: nothing was launched for this run")
    return [JobFolder(path.parent) for path in found]


def write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
