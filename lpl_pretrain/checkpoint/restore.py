"""Restoring a checkpoint into a strategy and its EMA, at any world size and under any strategy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from lpl_pretrain.checkpoint.background import run_and_agree
from lpl_pretrain.checkpoint.verify import Checkpoint, open_checkpoint
from lpl_pretrain.errors import CheckpointError, DamagedCheckpointError
from lpl_pretrain.parallel.strategy import ParamRange, Strategy
from lpl_pretrain.runtime.dist import first_error
from lpl_pretrain.runtime.world import World


class LocalAverages(Protocol):
    """Averages that are saved and restored with the strategy: an EMATracker."""

    def local_averages(self, *, power_only: bool = False) -> Iterator[tuple[str, ParamRange]]: ...


def open_on_all_ranks(
    folder: Path, world: World, *, identity: str, samples_per_step: int | None
) -> Checkpoint | str:
    """Collective.  Returns an undamaged checkpoint, or the damage that any rank has found.

    The ranks divide the files among themselves.  Raises CheckpointError on all ranks if the
    checkpoint belongs to another run or another version.
    """
    checkpoint: Checkpoint | None = None
    damage: str | None = None
    refusal: str | None = None
    try:
        checkpoint = open_checkpoint(
            folder,
            identity=identity,
            samples_per_step=samples_per_step,
            rank=world.rank,
            world_size=world.world_size,
        )
    except DamagedCheckpointError as error:
        damage = str(error)
    except CheckpointError as error:
        refusal = str(error)
    if (refusal := first_error(refusal)) is not None:
        raise CheckpointError(refusal)
    if (damage := first_error(damage)) is not None:
        return damage
    assert checkpoint is not None
    return checkpoint


def load_into(checkpoint: Checkpoint, strategy: Strategy, ema: LocalAverages) -> None:
    """Collective.  Fills parameters, moments and EMA from `checkpoint`.

    Raises CheckpointError, on all ranks, if it does not fit the model or the optimizer.
    """
    reader = checkpoint.reader

    def fill() -> None:
        entries = list(local_entries(strategy, ema))
        names: dict[str, set[str]] = {}
        for kind, param_range in entries:
            names.setdefault(kind, set()).add(param_range.name)
        for kind, needed in names.items():
            reader.check_shapes(kind, strategy.shapes, needed)
        for kind, param_range in entries:
            reader.fill(kind, param_range)

    run_and_agree(f"{checkpoint.folder}: cannot be restored", fill)
    strategy.sync_after_load(checkpoint.manifest.optimizer_steps)


def local_entries(strategy: Strategy, ema: LocalAverages) -> Iterator[tuple[str, ParamRange]]:
    """(kind, live range) of everything that a checkpoint stores of this rank.  Not collective."""
    for param_range in strategy.local_params():
        yield "param", param_range
    for name, param_range in strategy.local_optimizer_state():
        yield f"optimizer.{name}", param_range
    yield from ema.local_averages()
