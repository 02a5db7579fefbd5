"""Single updates of an assembled run, without the loop."""

from __future__ import annotations

from typing import Any

from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.trainer.assemble import Run
from lpl_pretrain.trainer.batches import TrainBatch
from lpl_pretrain.trainer.metrics import Meter
from lpl_pretrain.trainer.update import UpdateResult


def batches_of(run: Run, step: int) -> list[TrainBatch]:
    """This rank's microbatches of update number `step` (from 0), on its device."""
    return [run.reader.read(plan).to(run.device) for plan in run.microbatch_plans(step)]


def update(run: Run, step: int, meter: Meter | None = None) -> UpdateResult:
    """Collective. Make update number `step`; raises NonFiniteError as the loop does."""
    batches = batches_of(run, step)
    result = run.updater.update(step, batches, meter or Meter(run.device), Clock(run.device))
    run.updater.skipped_updates()
    return result


def term(run: Run, name: str = "lpl") -> Any:
    """The loss term of that name."""
    return next(term for term in run.updater.terms if term.name == name)
