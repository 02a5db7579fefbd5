"""When checkpoints are published, removed and restored: temporary name, manifest last, rename; the
newest undamaged one wins.

All ranks see one file system.  An error on one rank is raised on all of them, with the same
message.

Saving takes three phases: every rank copies its state, every rank writes the copy, rank 0
publishes.  The last two run on a thread, which never communicates: ranks agree on the main thread,
in `advance`, that all of them are through with a phase.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from lpl_pretrain.checkpoint.manifest import STATE, Manifest, sync_folder, write_json
from lpl_pretrain.checkpoint.retention import protected_steps
from lpl_pretrain.checkpoint.staging import HostCopies, Task
from lpl_pretrain.checkpoint.store import merge_parts, write_rank
from lpl_pretrain.checkpoint.verify import (
    Checkpoint,
    all_damaged,
    looks_sound,
    open_checkpoint,
    warn_passed_over,
)
from lpl_pretrain.config.rundir import MANIFEST, REMOVING, WRITING, RunDir
from lpl_pretrain.config.schema import CheckpointConfig
from lpl_pretrain.errors import CheckpointError, DamagedCheckpointError, SaveError, is_transient
from lpl_pretrain.parallel.strategy import ParamRange, Strategy
from lpl_pretrain.runtime.dist import broadcast_json, first_error
from lpl_pretrain.runtime.log import log
from lpl_pretrain.runtime.world import World


class HasPieces(Protocol):
    """What is restored beside the strategy: an EMATracker."""

    def pieces(self, *, power_only: bool = False) -> Iterator[tuple[str, ParamRange]]: ...


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
        """`identity`: of the run's configuration (config/check.py); a checkpoint of another one is
        refused.

        `check_ownership` does not return, on rank 0, where the run is another process's by now.

        `samples_per_step`, the global batch size, says that a training run goes on from what is
        restored: the trainer's state must be whole, and count as many samples. `keep_due`: the
        newest checkpoint at a multiple of `every_steps` stays, whatever came after it.
        """
        self.run_dir, self.config, self.identity, self.check_ownership = (
            run_dir,
            config,
            identity,
            check_ownership,
        )
        self.samples_per_step, self.keep_due = samples_per_step, keep_due
        self._copies = HostCopies()
        self._phases: list[Task] = []
        """Of the save under way: what is left to do, the first one being done now."""
        self._temporary: Path | None = None
        """On rank 0: where it is written."""
        self._newest = 0
        self._damaged: set[int] = set()
        """Steps of checkpoints that `restore_latest` found damaged; the same on all ranks."""
        self.published = 0
        """Not collective: step of the newest checkpoint that this process knows to be published;
        the same on all ranks.
        """

    def save(
        self,
        step: int,
        strategy: Strategy,
        ema: HasPieces,
        state: dict[str, Any],
        *,
        samples_seen: int,
    ) -> Path:
        """Communicates: the folder that the checkpoint will be; it is there after `finish`, or when
        `saving` has become False.
        """
        self.finish()  # of a snapshot, which is not to be announced
        self._newest = step
        return self._save(
            self.run_dir.checkpoint(step),
            strategy,
            _entries(strategy, ema),
            state,
            step,
            samples_seen,
        )

    def save_snapshot(
        self,
        step: int,
        strategy: Strategy,
        ema: HasPieces,
        state: dict[str, Any],
        *,
        samples_seen: int,
    ) -> Path:
        """Communicates: as `save`, of the power-function averages alone, and for good."""
        return self._save(
            self.run_dir.snapshot(step),
            strategy,
            ema.pieces(power_only=True),
            state,
            step,
            samples_seen,
        )

    @property
    def saving(self) -> bool:
        """Not collective: a save is under way; the same on all ranks."""
        return bool(self._phases)

    @property
    def busy(self) -> bool:
        """Not collective: this rank's thread works; `advance` would wait for it."""
        return bool(self._phases) and self._phases[0].running

    def advance(self) -> None:
        """Communicates while `saving`: waits until all ranks are through with this phase, and
        starts the next one.

        Raises on all ranks what went wrong on one; what was written until then is removed, for a
        full disk is full for others too.
        """
        if not self._phases:
            return
        done, *self._phases = self._phases
        trouble = first_error(done.wait())
        if trouble is not None:
            self._phases = []
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise SaveError(trouble) from done.cause
        if self._phases:
            self._phases[0].start()
        else:
            self.published = self._newest

    def finish(self) -> None:
        """Communicates while `saving`: returns when the checkpoint is published."""
        while self._phases:
            self.advance()

    def restore_latest(
        self,
        strategy: Strategy,
        ema: HasPieces,
        *,
        only_due: bool = False,
    ) -> dict[str, Any] | None:
        """Communicates: fills parameters, moments and EMA from the newest undamaged checkpoint;
        returns its state, or None.

        A damaged one is passed over with a warning.  When all are damaged nothing is restored and
        CheckpointError says so: a run never starts again from nothing by itself.  `only_due`, for a
        rollback: among those at multiples of `every_steps`; one that cannot be read for a reason
        that may pass is then not passed over, since an older one would lead to other parameters.
        """
        rank0 = strategy.world.rank == 0
        _together(
            f"{self.run_dir.checkpoints}: leftovers cannot be removed", self._sweep, act=rank0
        )
        complete = broadcast_json(self.run_dir.complete_checkpoints())
        steps = [step for step in complete if not only_due or self._is_due(step)]
        unusable = broadcast_json(self.run_dir.unusable_checkpoints())
        for name in unusable:
            log.warning(
                "%s: is no complete checkpoint (no %s of that step): passed over", name, MANIFEST
            )
        problem = ""
        for step in reversed(steps):
            opened = self._open(self.run_dir.checkpoint(step), strategy.world)
            if isinstance(opened, Checkpoint):
                return self._restore(opened, strategy, ema)
            if only_due and is_transient(
                error := CheckpointError(f"{opened}: the same command tries again")
            ):
                raise error
            warn_passed_over(self.run_dir.checkpoint(step), opened)
            self._damaged.add(step)
            problem = opened
        if steps:
            raise all_damaged(self.run_dir, len(steps), problem)
        if unusable:
            raise CheckpointError(
                f"{self.run_dir.checkpoints}: holds {', '.join(unusable[:5])} and no complete "
                "checkpoint: "
                "bring one back, or remove these folders to start again"
            )
        return None

    def _open(self, folder: Path, world: World) -> Checkpoint | str:
        """Communicates: a sound checkpoint, or what any rank found wrong with it.

        Every rank reads its share of the files.  Raises CheckpointError on all ranks where one
        refuses.
        """
        checkpoint, damaged, refused = None, None, None
        try:
            checkpoint = open_checkpoint(
                folder,
                identity=self.identity,
                samples_per_step=self.samples_per_step,
                share=world.rank,
                shares=world.world_size,
            )
        except DamagedCheckpointError as error:
            damaged = str(error)
        except CheckpointError as error:
            refused = str(error)
        if (refused := first_error(refused)) is not None:
            raise CheckpointError(refused)
        if (damaged := first_error(damaged)) is not None:
            return damaged
        assert checkpoint is not None
        return checkpoint

    def discard_after(self, step: int, world: World) -> None:
        """Collective.  Removes checkpoints and snapshots of later steps, which a rollback undid."""

        def remove() -> None:
            self.check_ownership()
            for later in self.run_dir.complete_checkpoints():
                if later > step:
                    self._remove(self.run_dir.checkpoint(later))
            for later in self.run_dir.complete_snapshots():
                if later > step:
                    self._remove(self.run_dir.snapshot(later))

        _together(
            f"{self.run_dir.path}: checkpoints after step {step} cannot be removed",
            remove,
            act=world.rank == 0,
            error=SaveError,
        )

    def _restore(
        self, checkpoint: Checkpoint, strategy: Strategy, ema: HasPieces
    ) -> dict[str, Any]:
        """Communicates: fills parameters, moments and EMA from a checkpoint, saved by any strategy
        at any world size.
        """
        reader = checkpoint.reader

        def fill() -> None:
            entries = list(_entries(strategy, ema))
            wanted: dict[str, set[str]] = {}
            for kind, piece in entries:
                wanted.setdefault(kind, set()).add(piece.name)
            for kind, names in wanted.items():
                reader.check(kind, strategy.shapes, names)
            for kind, piece in entries:
                reader.fill(kind, piece)

        _together(f"{checkpoint.folder}: cannot be restored", fill)
        strategy.sync_after_load(checkpoint.manifest.optimizer_steps)
        return checkpoint.state

    def _save(
        self,
        final: Path,
        strategy: Strategy,
        live: Iterator[tuple[str, ParamRange]],
        state: dict[str, Any],
        step: int,
        samples_seen: int,
    ) -> Path:
        self.finish()
        world, updates = strategy.world, strategy.optimizer_steps
        temporary = final.with_name(f"{WRITING}{final.name}_{self._own_name}")

        def publish() -> None:
            files = merge_parts(temporary, world.world_size)
            files[STATE] = write_json(temporary / STATE, state)
            kind = type(strategy).__name__
            Manifest(
                step, samples_seen, updates, kind, world.world_size, self.identity, files
            ).write(temporary)
            sync_folder(temporary)
            self.check_ownership()
            self._remove(final)
            temporary.rename(final)
            if final == self.run_dir.checkpoint(step):
                self._damaged.discard(step)
            sync_folder(final.parent)
            self._retain()

        rank0 = world.rank == 0
        self._temporary = temporary if rank0 else None
        _together(
            f"{temporary}: cannot be made",
            lambda: self._start(temporary),
            act=rank0,
            error=SaveError,
        )
        copies = self._copies.of(live, strategy.device) if self.config.asynchronous else list(live)
        self._phases = [
            Task(
                f"{temporary}: cannot be written", lambda: write_rank(temporary, world.rank, copies)
            ),
            Task(f"{final}: cannot be published", publish if rank0 else lambda: None),
        ]
        self._phases[0].start()
        if not self.config.asynchronous:
            self.finish()
        return final

    @cached_property
    def _own_name(self) -> str:
        """Communicates when first asked for: of this process group, so that ranks of an earlier one
        which live on, cut off on a node that nobody can reach, write into a folder of their own,
        which the heirs' first sweep has removed.
        """
        return broadcast_json(secrets.token_hex(4))

    def _start(self, temporary: Path) -> None:
        self.check_ownership()
        self._sweep()
        temporary.mkdir(parents=True)

    def _sweep(self) -> None:
        """Remove what interrupted saves and removals left behind."""
        for folder in self.run_dir.interrupted():
            if folder.name.startswith(REMOVING):
                _delete(folder)
            else:
                self._remove(folder)

    def _retain(self) -> None:
        """Remove what is older than the `keep_last` newest checkpoints that look sound, and not
        wanted otherwise.
        """
        steps, every = self.run_dir.complete_checkpoints(), self.config.keep_every_steps
        sound = islice(filter(self._looks_sound, reversed(steps)), self.config.keep_last)
        newest = list(sound)
        if len(newest) < self.config.keep_last:
            return
        kept = protected_steps(self.run_dir)
        if self.keep_due:
            kept.update([step for step in steps if self._is_due(step)][-1:])
        for step in steps:
            if step < newest[-1] and step not in kept and (every is None or step % every):
                self._remove(self.run_dir.checkpoint(step))

    def _looks_sound(self, step: int) -> bool:
        """Without reading the files again."""
        return step not in self._damaged and looks_sound(self.run_dir.checkpoint(step))

    def _is_due(self, step: int) -> bool:
        return step % self.config.every_steps == 0

    def _remove(self, folder: Path) -> None:
        """By rename first, so that a checkpoint is never seen half removed, and nobody begins a
        file in it meanwhile.
        """
        if os.path.lexists(folder):
            doomed = folder.with_name(REMOVING + folder.name)
            folder.rename(doomed)
            _delete(doomed)


def _delete(path: Path) -> None:
    """A folder with its content; of a symbolic link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _entries(strategy: Strategy, ema: HasPieces) -> Iterator[tuple[str, ParamRange]]:
    """(kind, live piece) of everything that a checkpoint holds of this rank."""
    for piece in strategy.local_params():
        yield "param", piece
    for name, piece in strategy.local_optimizer_state():
        yield f"optimizer.{name}", piece
    yield from ema.pieces()


def _together(
    what: str,
    action: Callable[[], None],
    *,
    act: bool = True,
    error: type[CheckpointError] = CheckpointError,
) -> None:
    """Communicates: run `action` on the ranks that `act`; an error on any of them is raised on all."""
    task = Task(what, action if act else lambda: None)
    task.run()
    trouble = first_error(task.trouble)
    if trouble is not None:
        raise error(trouble) from task.cause
