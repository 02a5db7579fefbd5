"""Removal of checkpoints: which are kept, which are protected, and how a folder is removed.

An evaluator protects a checkpoint by a lease, evaluations/step_*/<protocol>.lease, which it holds
while it generates from that step (evaluation/evaluator.py); a queued evaluation job holds
<protocol>.queued.lease (launch/evaluation_jobs.py).  A stale lease protects nothing.  A
best-checkpoint file, evaluations/best_<protocol>.json, protects the step that it names for good.
"""

from __future__ import annotations

import os
import shutil
from itertools import islice
from pathlib import Path

from lpl_pretrain.checkpoint.verify import has_expected_sizes
from lpl_pretrain.config.best import best_steps
from lpl_pretrain.config.rundir import REMOVING, RunDir
from lpl_pretrain.config.schema import CheckpointConfig
from lpl_pretrain.runtime.lease import is_stale
from lpl_pretrain.runtime.log import log


class Retention:
    """Removes checkpoints that `config` does not keep.  Not collective: only rank 0 removes."""

    def __init__(self, run_dir: RunDir, config: CheckpointConfig, *, keep_due: bool) -> None:
        """`keep_due`: also keep the newest checkpoint at a multiple of `every_steps`."""
        self.run_dir = run_dir
        self.config = config
        self.keep_due = keep_due
        self.damaged: set[int] = set()
        """Steps whose checkpoint is known to be damaged; they do not count as kept ones."""

    def remove_expired(self) -> None:
        """Removes checkpoints older than the `keep_last` newest intact ones, unless they are
        protected or at a multiple of `keep_every_steps`.
        """
        steps = self.run_dir.complete_checkpoints()
        intact = (step for step in reversed(steps) if self._seems_intact(step))
        newest_intact = list(islice(intact, self.config.keep_last))
        if len(newest_intact) < self.config.keep_last:
            return
        kept = protected_steps(self.run_dir)
        if self.keep_due:
            kept.update([step for step in steps if self.is_due(step)][-1:])
        if self.config.keep_every_steps is not None:
            kept.update(step for step in steps if step % self.config.keep_every_steps == 0)
        for step in steps:
            if step < newest_intact[-1] and step not in kept:
                remove_folder(self.run_dir.checkpoint(step))

    def is_due(self, step: int) -> bool:
        """Whether `step` is a multiple of `every_steps`; a run also saves where it stops."""
        return step % self.config.every_steps == 0

    def _seems_intact(self, step: int) -> bool:
        """Whether a checkpoint looks undamaged, without reading the content of its files."""
        return step not in self.damaged and has_expected_sizes(self.run_dir.checkpoint(step))


def protected_steps(run_dir: RunDir) -> set[int]:
    """Steps whose checkpoints an evaluation needs, now or later."""
    being_scored = {step for step, lease in run_dir.evaluation_leases() if not is_stale(lease)}
    return being_scored | best_steps(run_dir.best_files(), log.warning)


def remove_after(run_dir: RunDir, step: int) -> None:
    """Removes all checkpoints and snapshots of later steps."""
    for later in run_dir.complete_checkpoints():
        if later > step:
            remove_folder(run_dir.checkpoint(later))
    for later in run_dir.complete_snapshots():
        if later > step:
            remove_folder(run_dir.snapshot(later))


def remove_interrupted(run_dir: RunDir) -> None:
    """Removes what interrupted saves and removals have left behind."""
    for folder in run_dir.interrupted():
        if folder.name.startswith(REMOVING):
            _delete(folder)
        else:
            remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Renames a folder and then deletes it, so that no process finds a checkpoint half removed or
    creates a file in it meanwhile.
    """
    if os.path.lexists(folder):
        trash = folder.with_name(REMOVING + folder.name)
        folder.rename(trash)
        _delete(trash)


def _delete(path: Path) -> None:
    """Deletes a folder with its content; of a symbolic link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
