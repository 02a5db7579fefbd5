"""When checkpoints are published, removed and restored: temporary name, manifest last, rename; the newest undamaged one wins.

All ranks see one file system.  An error on one rank is raised on all of them, with the same message.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from lpl_pretrain.checkpoint.manifest import Manifest, damage, sync_folder, write_json
from lpl_pretrain.checkpoint.store import STATE, Reader, merge_parts, read_state, write_rank
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import CheckpointConfig
from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.parallel.strategy import Piece, Strategy
from lpl_pretrain.runtime.dist import broadcast_json, first_over_ranks

log = logging.getLogger(__name__)
WRITING, REMOVING = ".writing_", ".removing_"


class HasPieces(Protocol):
    """What is restored beside the strategy: an EMATracker."""

    def pieces(self, *, power_only: bool = False) -> Iterator[tuple[str, Piece]]: ...


class CheckpointManager:
    def __init__(self, run_dir: RunDir, config: CheckpointConfig) -> None:
        self.run_dir, self.config = run_dir, config

    def save(self, step: int, strategy: Strategy, ema: HasPieces, state: dict[str, Any]) -> Path:
        """Communicates: every rank writes its own pieces, rank 0 publishes them with its `state` (JSON); returns the folder."""
        return self._save(self.run_dir.checkpoint(step), step, strategy, _entries(strategy, ema), state)

    def save_snapshot(self, step: int, strategy: Strategy, ema: HasPieces, state: dict[str, Any]) -> Path:
        """Communicates: as `save`, of the power-function averages alone, and for good."""
        return self._save(self.run_dir.snapshot(step), step, strategy, ema.pieces(power_only=True), state)

    def _save(
        self, final: Path, step: int, strategy: Strategy, entries: Iterator[tuple[str, Piece]], state: dict[str, Any]
    ) -> Path:
        world, temporary = strategy.world, final.with_name(WRITING + final.name)

        def publish() -> None:
            files = merge_parts(temporary, world.world_size)
            files[STATE] = write_json(temporary / STATE, state)
            Manifest(step, strategy.optimizer_steps, type(strategy).__name__, world.world_size, files).write(temporary)
            sync_folder(temporary)
            self._remove(final)
            temporary.rename(final)
            sync_folder(final.parent)
            self._retain()

        rank0 = world.rank == 0
        _together(f"{temporary}: cannot be made", lambda: self._start(temporary), act=rank0)
        _together(f"{temporary}: cannot be written", lambda: write_rank(temporary, world.rank, entries))
        _together(f"{final}: cannot be published", publish, act=rank0)
        return final

    def restore_latest(self, strategy: Strategy, ema: HasPieces) -> dict[str, Any] | None:
        """Communicates: fills parameters, moments and EMA from the newest undamaged checkpoint; returns its state, or None.

        A damaged one is passed over with a warning.  When all are damaged nothing is restored and CheckpointError says so: a run
        never starts again from nothing by itself.
        """
        world = strategy.world
        _together(f"{self.run_dir.checkpoints}: leftovers cannot be removed", self._sweep, act=world.rank == 0)
        steps = broadcast_json(self.run_dir.complete_checkpoints())
        for step in reversed(steps):
            folder = self.run_dir.checkpoint(step)
            trouble = first_over_ranks(damage(folder, share=world.rank, shares=world.world_size))
            if trouble is None:
                return self.restore(folder, strategy, ema)
            log.warning("DAMAGED CHECKPOINT %s: passed over for an older one. %s", folder.name, trouble)
        if steps:
            raise CheckpointError(
                f"{self.run_dir.checkpoints}: all {len(steps)} checkpoints are damaged (see the warnings above): "
                "bring one back, or remove them to start again"
            )
        return None

    def restore(self, folder: Path, strategy: Strategy, ema: HasPieces) -> dict[str, Any]:
        """Communicates: fills parameters, moments and EMA from one checkpoint, saved by any strategy at any world size."""

        def fill() -> None:
            reader = Reader(folder)
            entries = list(_entries(strategy, ema))
            for kind in sorted({kind for kind, _ in entries}):
                reader.check(kind, strategy.shapes)
            for kind, piece in entries:
                reader.fill(kind, piece)

        _together(f"{folder}: cannot be restored", fill)
        strategy.accept_loaded(Manifest.read(folder).optimizer_steps)
        return read_state(folder)

    def _start(self, temporary: Path) -> None:
        self._sweep()
        temporary.mkdir(parents=True)

    def _sweep(self) -> None:
        """Remove what interrupted saves and removals left behind."""
        for parent in (self.run_dir.checkpoints, self.run_dir.snapshot(0).parent):
            for prefix in (WRITING, REMOVING):
                for folder in parent.glob(f"{prefix}*"):
                    shutil.rmtree(folder)

    def _retain(self) -> None:
        steps, every = self.run_dir.complete_checkpoints(), self.config.keep_every_steps
        for step in steps[: -self.config.keep_last]:
            if every is None or step % every:
                self._remove(self.run_dir.checkpoint(step))

    def _remove(self, folder: Path) -> None:
        """By rename first, so that a checkpoint is never seen half removed."""
        if folder.exists():
            doomed = folder.with_name(REMOVING + folder.name)
            folder.rename(doomed)
            shutil.rmtree(doomed)


def _entries(strategy: Strategy, ema: HasPieces) -> Iterator[tuple[str, Piece]]:
    """(kind, live piece) of everything that a checkpoint holds of this rank."""
    for piece in strategy.local_params():
        yield "param", piece
    for name, piece in strategy.local_optimizer_state():
        yield f"optimizer.{name}", piece
    yield from ema.pieces()


def _together(what: str, action: Callable[[], None], *, act: bool = True) -> None:
    """Communicates: run `action` on the ranks that `act`; an error on any of them is raised on all."""
    trouble: str | None = None
    cause: Exception | None = None
    try:
        if act:
            action()
    except (OSError, ValueError, KeyError, CheckpointError) as error:
        trouble, cause = str(error) if isinstance(error, CheckpointError) else f"{what}: {type(error).__name__}: {error}", error
    trouble = first_over_ranks(trouble)
    if trouble is not None:
        raise CheckpointError(trouble) from cause
