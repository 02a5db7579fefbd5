"""Saves, publishes and restores checkpoints: written under a temporary name, manifest last, then
renamed; restored is the newest undamaged one.

All ranks share one file system.  An error on one rank is raised on all of them, with the same
message.

A save has three phases: every rank copies its state, every rank writes the copy, rank 0 publishes.
The last two run on a thread, which makes no collective calls: the ranks agree on the main thread,
in `advance`, that all of them have finished a phase.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lpl_pretrain.checkpoint.background import BackgroundJob, run_and_agree
from lpl_pretrain.checkpoint.manifest import STATE, Manifest, sync_folder, write_json
from lpl_pretrain.checkpoint.restore import (
    LocalAverages,
    load_into,
    local_entries,
    open_on_all_ranks,
)
from lpl_pretrain.checkpoint.retention import (
    Retention,
    remove_after,
    remove_folder,
    remove_interrupted,
)
from lpl_pretrain.checkpoint.staging import HostCopies
from lpl_pretrain.checkpoint.store import merge_parts, write_rank
from lpl_pretrain.checkpoint.verify import Checkpoint, all_damaged_error, warn_damaged
from lpl_pretrain.config.rundir import MANIFEST, WRITING, RunDir
from lpl_pretrain.config.schema import CheckpointConfig
from lpl_pretrain.errors import CheckpointError, SaveError, is_transient
from lpl_pretrain.parallel.strategy import ParamRange, Strategy
from lpl_pretrain.runtime.dist import broadcast_json, first_error
from lpl_pretrain.runtime.log import log
from lpl_pretrain.runtime.world import World


class CheckpointManager:
    def __init__(
        self,
        run_dir: RunDir,
        config: CheckpointConfig,
        identity: str = "",
        check_ownership: Callable[[], None] = lambda: None,
        samples_per_step: int | None = None,
        *,
        keep_due: bool = False,
    ) -> None:
        """`identity`: hash of the run's configuration (config/check.py); a checkpoint with another
        one is refused.

        `check_ownership` exits the process if the run's lease was taken over; rank 0 calls it
        before it writes to the run directory.

        `samples_per_step`, the global batch size, is given by a training run that resumes: the
        trainer's state must then be complete, and its count of samples right.

        `keep_due`: keep the newest checkpoint at a multiple of `every_steps`, even if newer ones
        exist.
        """
        self.run_dir = run_dir
        self.config = config
        self.identity = identity
        self.check_ownership = check_ownership
        self.samples_per_step = samples_per_step
        self.published = 0
        """Step of the newest checkpoint that this process has published; the same on all ranks."""
        self._retention = Retention(run_dir, config, keep_due=keep_due)
        self._host_copies = HostCopies()
        self._phases: list[BackgroundJob] = []
        """Remaining phases of the current save; the first one is running."""
        self._temporary: Path | None = None
        """Folder of the current save; on rank 0 only."""
        self._newest = 0

    def save(
        self,
        step: int,
        strategy: Strategy,
        ema: LocalAverages,
        state: dict[str, Any],
        *,
        samples_seen: int,
    ) -> Path:
        """Collective.  Starts a save; returns the folder of the checkpoint, which exists after
        `finish`, or once `saving` is False.  Raises SaveError.
        """
        self.finish()  # a snapshot may be in progress, which `published` does not count
        self._newest = step
        entries = local_entries(strategy, ema)
        return self._save(
            self.run_dir.checkpoint(step), strategy, entries, state, step, samples_seen
        )

    def save_snapshot(
        self,
        step: int,
        strategy: Strategy,
        ema: LocalAverages,
        state: dict[str, Any],
        *,
        samples_seen: int,
    ) -> Path:
        """Collective.  Saves the power-function averages alone, as `save` does; a snapshot is never
        removed.
        """
        entries = ema.local_averages(power_only=True)
        return self._save(self.run_dir.snapshot(step), strategy, entries, state, step, samples_seen)

    @property
    def saving(self) -> bool:
        """Whether a save is in progress; the same on all ranks.  Not collective."""
        return bool(self._phases)

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is running, so that `advance` would wait.  Not collective."""
        return bool(self._phases) and self._phases[0].running

    def advance(self) -> None:
        """Collective while `saving`.  Waits until all ranks have finished the current phase and
        starts the next one.

        Raises an error of one rank on all ranks.  The files written so far are then removed: a disk
        that is full may be needed by others.
        """
        if not self._phases:
            return
        done = self._phases.pop(0)
        error = first_error(done.wait())
        if error is not None:
            self._phases = []
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise SaveError(error) from done.cause
        if self._phases:
            self._phases[0].start()
        else:
            self.published = self._newest

    def finish(self) -> None:
        """Collective while `saving`.  Returns when the checkpoint is published."""
        while self._phases:
            self.advance()

    def restore_latest(
        self,
        strategy: Strategy,
        ema: LocalAverages,
        *,
        only_due: bool = False,
    ) -> dict[str, Any] | None:
        """Collective.  Fills parameters, moments and EMA from the newest undamaged checkpoint;
        returns its state, or None if there is no checkpoint.

        A damaged one is skipped with a warning.  If all are damaged, CheckpointError is raised and
        nothing is restored: a run never starts from scratch by itself.  `only_due`, for a rollback,
        considers only multiples of `every_steps`; a transient read error is then raised, since an
        older checkpoint would lead to other parameters.
        """
        run_and_agree(
            f"{self.run_dir.checkpoints}: leftovers cannot be removed",
            lambda: remove_interrupted(self.run_dir),
            participates=strategy.world.rank == 0,
        )
        complete = broadcast_json(self.run_dir.complete_checkpoints())
        steps = [step for step in complete if not only_due or self._retention.is_due(step)]
        unusable = broadcast_json(self.run_dir.unusable_checkpoints())
        for name in unusable:
            log.warning(
                "%s: is no complete checkpoint (no %s of that step): passed over", name, MANIFEST
            )
        damage = ""
        for step in reversed(steps):
            opened = self._open(step, strategy.world)
            if isinstance(opened, Checkpoint):
                load_into(opened, strategy, ema)
                return opened.state
            damage = opened
            error = CheckpointError(f"{damage}: the same command tries again")
            if only_due and is_transient(error):
                raise error
            warn_damaged(self.run_dir.checkpoint(step), damage)
            self._retention.damaged.add(step)
        if steps:
            raise all_damaged_error(self.run_dir, len(steps), damage)
        if unusable:
            raise CheckpointError(
                f"{self.run_dir.checkpoints}: holds {', '.join(unusable[:5])} and no complete "
                "checkpoint: bring one back, or remove these folders to start again"
            )
        return None

    def _open(self, step: int, world: World) -> Checkpoint | str:
        return open_on_all_ranks(
            self.run_dir.checkpoint(step),
            world,
            identity=self.identity,
            samples_per_step=self.samples_per_step,
        )

    def discard_after(self, step: int, world: World) -> None:
        """Collective.  Removes checkpoints and snapshots of later steps, which a rollback undid."""

        def remove() -> None:
            self.check_ownership()
            remove_after(self.run_dir, step)

        run_and_agree(
            f"{self.run_dir.path}: checkpoints after step {step} cannot be removed",
            remove,
            participates=world.rank == 0,
            error_type=SaveError,
        )

    def _save(
        self,
        final: Path,
        strategy: Strategy,
        entries: Iterator[tuple[str, ParamRange]],
        state: dict[str, Any],
        step: int,
        samples_seen: int,
    ) -> Path:
        """Collective.  Starts to save `entries` to the folder `final`."""
        self.finish()
        rank = strategy.world.rank
        temporary = final.with_name(f"{WRITING}{final.name}_{self._group_token}")
        self._temporary = temporary if rank == 0 else None
        run_and_agree(
            f"{temporary}: cannot be made",
            lambda: self._create(temporary),
            participates=rank == 0,
            error_type=SaveError,
        )
        if self.config.asynchronous:
            saved = self._host_copies.copy(entries, strategy.device)
        else:
            saved = list(entries)
        manifest = Manifest(
            step=step,
            samples_seen=samples_seen,
            optimizer_steps=strategy.optimizer_steps,
            strategy=type(strategy).__name__,
            world_size=strategy.world.world_size,
            identity=self.identity,
            files={},
        )

        def write() -> None:
            write_rank(temporary, rank, saved)

        def publish() -> None:
            if rank == 0:
                self._publish(temporary, final, manifest, state)

        self._phases = [
            BackgroundJob(f"{temporary}: cannot be written", write),
            BackgroundJob(f"{final}: cannot be published", publish),
        ]
        self._phases[0].start()
        if not self.config.asynchronous:
            self.finish()
        return final

    def _create(self, temporary: Path) -> None:
        self.check_ownership()
        remove_interrupted(self.run_dir)
        temporary.mkdir(parents=True)

    def _publish(
        self, temporary: Path, final: Path, manifest: Manifest, state: dict[str, Any]
    ) -> None:
        """Completes `temporary` and renames it to `final`; then removes expired checkpoints.

        Runs on rank 0's thread.
        """
        files = merge_parts(temporary, manifest.world_size)
        files[STATE] = write_json(temporary / STATE, state)
        replace(manifest, files=files).write(temporary)
        sync_folder(temporary)
        self.check_ownership()
        remove_folder(final)
        temporary.rename(final)
        if final == self.run_dir.checkpoint(manifest.step):
            self._retention.damaged.discard(manifest.step)
        sync_folder(final.parent)
        self._retention.remove_expired()

    @cached_property
    def _group_token(self) -> str:
        """Random name of this process group.  Collective when first read.

        Ranks of an earlier group may still run on a disconnected node.  They write into a folder of
        their own, which the first save of the new group has removed.
        """
        return broadcast_json(secrets.token_hex(4))
