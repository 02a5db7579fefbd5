"""Goes back before a spike, and on without the samples up to and with those of the spike.

Update number `step` (from 0) is made of the samples at position `step + jump_updates` of the order, and
all its draws are keyed by that position.  A rollback from position p to a checkpoint of c updates sets
jump_updates = p + skip_updates - c, so that the next update begins behind the spike.  The number
is in every checkpoint, so the order stays a function of the count and a resumed run needs
nothing else.  The samples between the checkpoint and the spike are not used in this epoch either.

Only checkpoints at multiples of checkpoint.every_steps are gone back to: those that a stop left behind
would make a run that was interrupted differ from one that was not.  A process that ends after a
rollback and before the next checkpoint resumes before it, meets the same spike and decides the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from lpl_pretrain.config.schema import OnSpike
from lpl_pretrain.runtime.log import log
from lpl_pretrain.trainer.assemble import Run
from lpl_pretrain.trainer.sinks import Sinks
from lpl_pretrain.trainer.spikes import Spike


@dataclass(frozen=True)
class Start:
    """Where the loop starts: after how many updates, and after which spike, if one led there."""

    step: int
    spike: Spike | None = None


def recover(run: Run, sinks: Sinks, spike: Spike) -> Start | None:
    """Collective.  Rolls back if that is asked for and there is a checkpoint; says what was done.

    None: the update was left out and training goes on with the next.
    """
    wanted, start = run.config.optimizer.on_spike, None
    if wanted is OnSpike.ROLLBACK:
        start = roll_back(run, spike)
        if start is None:
            log.warning("no checkpoint to go back to yet: the update is left out")
    facts = {
        "action": "skip" if start is None else "rollback",
        "quantity": spike.quantity,
        "value": spike.value,
        "bound": spike.bound,
        "median": spike.median,
        "samples": spike.samples,
    }
    if start is not None:
        facts |= {"to_step": start.step, "jump_updates": run.jump_updates}
        log.warning("rolled back to step %d; %d updates jumped over", start.step, run.jump_updates)
    sinks.event("spike", spike.step, **facts)
    return start


def roll_back(run: Run, spike: Spike) -> Start | None:
    """Collective.  Restores the newest checkpoint that was due before the spike; None without one."""
    guard, position = run.updater.spikes, spike.step - 1 + run.jump_updates
    assert guard is not None
    run.checkpoints.finish()
    state = run.checkpoints.restore_latest(run.strategy, run.ema, only_due=True)
    if state is None:
        return None
    events = guard.events
    run.load_state(state)
    guard.events = events
    run.jump_updates = position + run.config.optimizer.spike.skip_updates - state["step"]
    run.checkpoints.discard_after(state["step"], run.world)
    return Start(state["step"], spike)
