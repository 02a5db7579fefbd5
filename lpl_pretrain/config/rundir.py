"""Layout of a run's folder: the names of its files, its complete checkpoints and pending
evaluations.

runs/<name>/  config.yaml  provenance.json  preflight.json  metrics.jsonl  report.html
              checkpoints/step_00010000/{manifest.json, index.json, pieces_*.safetensors,
              state.json} snapshots/step_00010000/ (power-function averages, as a checkpoint)
              evaluations/step_00010000/<protocol>.json   logs/rank_00000.log
              samples/step_00010000_<protocol>.png
              logs/stacks_rank_00000.txt (of a hang)
              evaluations/best_<protocol>.json   lpl/step_00010000.png
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from lpl_pretrain.config.records import is_scored
from lpl_pretrain.config.steps import step_name, step_of
from lpl_pretrain.config.strict_json import read_json
from lpl_pretrain.errors import CheckpointError

MANIFEST = "manifest.json"
WRITING, REMOVING = ".writing_", ".removing_"
"""Before the name of the folder of a checkpoint or snapshot that is being saved or removed."""


@dataclass(frozen=True)
class RunDir:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def preflight(self) -> Path:
        """Findings of the newest start about its nodes."""
        return self.path / "preflight.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def live(self) -> Path:
        """Lease of the process that trains the run now."""
        return self.path / "live.lease"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)

    def snapshot(self, step: int) -> Path:
        """Averages that are kept for good, in the format of a checkpoint."""
        return self.path / "snapshots" / step_name(step)

    def complete_snapshots(self) -> list[int]:
        return _complete(self.path / "snapshots")

    def evaluation(self, step: int, protocol: str) -> Path:
        return self.path / "evaluations" / step_name(step) / f"{protocol}.json"

    def evaluation_lease(self, step: int, protocol: str) -> Path:
        """Lease of the evaluator that scores the checkpoint, which is not removed meanwhile."""
        return self.path / "evaluations" / step_name(step) / f"{protocol}.lease"

    def queue_lease(self, step: int, protocol: str) -> Path:
        """Lease for the time that an evaluator waits in a queue; it protects the checkpoint in the
        same way.
        """
        return self.path / "evaluations" / step_name(step) / f"{protocol}.queued.lease"

    def best(self, protocol: str) -> Path:
        """File that names the checkpoint with the best score, which is not removed."""
        return self.path / "evaluations" / f"best_{protocol}.json"

    def best_files(self) -> list[Path]:
        return sorted((self.path / "evaluations").glob("best_*.json"))

    def evaluation_leases(self) -> list[tuple[int, Path]]:
        """(step, file) of all, stale ones included."""
        found = (
            (step_of(path.parent.name), path)
            for path in (self.path / "evaluations").glob("step_*/*.lease")
        )
        return [(step, path) for step, path in found if step is not None]

    def samples(self, step: int, protocol: str) -> Path:
        return self.path / "samples" / f"{step_name(step)}_{protocol}.png"

    def panels(self, term: str, step: int) -> Path:
        """Image of what a loss term compared at a checkpoint, such as lpl/step_00010000.png."""
        return self.path / term / f"{step_name(step)}.png"

    def lpl_panels(self) -> dict[int, Path]:
        """Panels of LPL by step, ascending."""
        found = ((step_of(path.stem), path) for path in (self.path / "lpl").glob("step_*.png"))
        return dict(sorted((step, path) for step, path in found if step is not None))

    def log(self, rank: int) -> Path:
        return self.path / "logs" / f"rank_{rank:05d}.log"

    def ledger(self, rank: int) -> Path:
        """Sample indices of this rank's updates, with log.sample_indices."""
        return self.path / "logs" / f"samples_rank_{rank:05d}.jsonl"

    def stacks(self, rank: int) -> Path:
        """Stacks of a rank's threads when the run hung; a second hang appends."""
        return self.path / "logs" / f"stacks_rank_{rank:05d}.txt"

    def complete_checkpoints(self) -> list[int]:
        """Steps whose checkpoint has its manifest (written last), ascending."""
        return _complete(self.checkpoints)

    def last_intact_step(self) -> int | None:
        """Step of the newest complete checkpoint whose files have the sizes in its manifest; None:
        there is none.

        The content of the files is not read.
        """
        for step in reversed(self.complete_checkpoints()):
            if _has_its_files(self.checkpoint(step)):
                return step
        return None

    def interrupted(self) -> list[Path]:
        """Folders of checkpoints and snapshots that are being saved or removed, or whose saving or
        removal was interrupted.
        """
        parents = (self.checkpoints, self.path / "snapshots")
        return [
            folder
            for parent in parents
            for kind in (WRITING, REMOVING)
            for folder in parent.glob(f"{kind}*")
        ]

    def unusable_checkpoints(self) -> list[str]:
        """Names of step folders that are no complete checkpoint.

        Checkpoints are published whole, so such a folder lost its manifest or was renamed.
        """
        complete = set(map(step_name, self.complete_checkpoints()))
        return [
            name
            for name in _names(self.checkpoints)
            if name.startswith("step_") and name not in complete
        ]

    def complete_step(self, step: int | None) -> int:
        """`step`, or the newest, when its checkpoint is complete.  Raises CheckpointError."""
        complete = self.complete_checkpoints()
        if not complete:
            raise CheckpointError(
                f"{self.checkpoints}: no complete checkpoint (one with a manifest.json) yet; train "
                "until the first one is saved"
            )
        if step is None:
            return complete[-1]
        if step not in complete:
            steps = ", ".join(map(str, complete))
            raise CheckpointError(
                f"{self.checkpoint(step)}: not a complete checkpoint; complete steps: {steps}"
            )
        return step

    def has_logged_steps(self) -> bool:
        """metrics.jsonl holds an update, and not events alone."""
        if not self.metrics.is_file():
            return False
        with self.metrics.open(errors="replace") as file:
            return any(_is_step(line) for line in file)

    def pending_evaluations(self, protocol: str) -> list[int]:
        """Complete checkpoints without a sound score by `protocol`, ascending."""
        return [
            step
            for step in self.complete_checkpoints()
            if not is_scored(self.evaluation(step, protocol))
        ]


def _is_step(line: str) -> bool:
    try:
        found = json.loads(line)
    except ValueError:  # cut by a kill
        return False
    return isinstance(found, dict) and "step" in found and "event" not in found


def _has_its_files(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint's manifest is there, with its size."""
    try:
        files = read_json(checkpoint / MANIFEST)["files"]
        return all(
            (checkpoint / name).stat().st_size == record["bytes"] for name, record in files.items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # no manifest that a checkpoint of ours has


def _complete(parent: Path) -> list[int]:
    return [step for step in _steps(parent) if (parent / step_name(step) / MANIFEST).is_file()]


def _steps(parent: Path) -> list[int]:
    """Steps that have a folder, ascending."""
    return sorted(step for step in map(step_of, _names(parent)) if step is not None)


def _names(parent: Path) -> list[str]:
    """Names in a folder, in order; none where there is no folder.  Raises CheckpointError."""
    try:
        return sorted(os.listdir(parent)) if parent.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{parent}: cannot be listed: {error.strerror or error}") from None
