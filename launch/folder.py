"""What a job leaves in RUN/launch, for itself after a requeue and for people: names, times and exits of every attempt."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl_pretrain.runtime.files import published

BAD_INPUT = 2
"""Exit status of `lpl-pretrain` for what is the input's fault: trying again would not help."""
EXIT = "exit_{job}_{attempt}_rank_{rank:05d}.json"


@dataclass(frozen=True)
class JobFolder:
    path: Path

    @property
    def facts(self) -> Path:
        """Of the newest submission: job, command, profile."""
        return self.path / "job.json"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def cancelled(self) -> Path:
        """Is there once `launch cancel` was asked for: then nothing goes on by itself."""
        return self.path / "cancelled"

    def read_facts(self) -> dict[str, Any]:
        return json.loads(self.facts.read_text())

    def write_facts(self, facts: dict[str, Any]) -> None:
        publish_json(self.facts, facts)

    def read_attempts(self) -> list[dict[str, Any]]:
        if not self.attempts.is_file():
            return []
        return [json.loads(line) for line in self.attempts.read_text().splitlines()]

    def note_attempt(self, attempt: dict[str, Any]) -> None:
        with self.attempts.open("a") as file:
            file.write(json.dumps(attempt) + "\n")

    def note_exit(self, job: str, attempt: int, rank: int, status: int, host: str, *, stopped: bool) -> None:
        """`stopped`: the scheduler had asked for it."""
        found = {"rank": rank, "status": status, "host": host, "stopped": stopped, "time_s": time.time()}
        publish_json(self.path / EXIT.format(job=job, attempt=attempt, rank=rank), found)

    def exits(self, job: str, attempt: int) -> list[dict[str, Any]]:
        """Of the ranks that came to one, the first one first."""
        pattern = EXIT.format(job=job, attempt=attempt, rank=0).replace("00000", "*")
        return sorted((json.loads(path.read_text()) for path in self.path.glob(pattern)), key=lambda found: found["time_s"])

    def rendezvous(self, job: str, attempt: int) -> Path:
        """Where rank 0 of an attempt says how it is reached."""
        return self.path / f"rendezvous_{job}_{attempt}.json"

    def has_later_attempt(self, job: str, attempt: int) -> bool:
        found = self.path.glob(f"rendezvous_{job}_*.json")
        return any(int(path.stem.rpartition("_")[2]) > attempt for path in found)


def publish_json(path: Path, value: dict[str, Any]) -> None:
    with published(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
