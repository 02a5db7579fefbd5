"""Goes back before a spike, and on without the samples up to and with those of the spike.

Update number `step` (from 0) is made of the samples at position `step + jump_updates` of the order,
and all its draws are keyed by that position.  A rollback from position p to a checkpoint of c
updates sets jump_updates = p + skip_updates - c, so that the next update begins behind the spike.
The number is in every checkpoint, so the order stays a function of the count and a resumed run
needs nothing else.  The samples between the checkpoint and the spike are not used in this epoch
either.

Only checkpoints at multiples of checkpoint.every_steps are gone back to: those that a stop left
behind would make a run that was interrupted differ from one that was not.  A process that ends
after a rollback and before the next checkpoint resumes before it, meets the same spike and decides
the same.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lpl_pretrain.config.schema import OnSpike, OptimizerConfig
from lpl_pretrain.errors import SpikeError
from lpl_pretrain.runtime.log import log
from lpl_pretrain.trackers.build import Trackers
from lpl_pretrain.trainer.assemble import Run
from lpl_pretrain.trainer.spikes import Spike


@dataclass(frozen=True)
class Start:
    """Where the loop starts: after how many updates, and after which spike, if one led there."""

    step: int
    spike: Spike | None = None


def recover(run: Run, trackers: Trackers, spike: Spike) -> Start | None:
    """Collective.  Does what optimizer.on_spike says, and writes it down; raises SpikeError to
    stop.

    None: the update is left out, and training goes on with the next one.
    """
    config, guard, start = run.config.optimizer, run.updater.spikes, None
    assert guard is not None
    event = {name: value for name, value in asdict(spike).items() if name != "step"}
    if (why := reason_to_stop(config, guard.events)) is not None:
        trackers.event("spike", spike.step, action="stop", **event)
        raise SpikeError(f"{spike}. {why}")
    if config.on_spike is OnSpike.ROLLBACK:
        start = roll_back(run, spike)
    if start is None:
        trackers.event("spike", spike.step, action="skip", **event)
        done = "update left out"
        if config.on_spike is OnSpike.ROLLBACK:
            done += ", for there is no checkpoint to go back to"
    else:
        to = {"to_step": start.step, "jump_updates": run.jump_updates}
        trackers.event("spike", spike.step, action="rollback", **to, **event)
        done = f"rolled back to step {start.step}, {run.jump_updates} updates jumped over in all"
    log.warning("%s; %s (%d of at most %d)", spike, done, guard.events, config.spike.max_events)
    return start


def reason_to_stop(config: OptimizerConfig, events: int) -> str | None:
    """With the remedy; None when the run goes on after `events` spikes."""
    most = config.spike.max_events
    if config.on_spike is OnSpike.STOP:
        return (
            "Parameters and moments are as before this step. Look at these samples, lower "
            "optimizer.lr "
            "or raise optimizer.warmup_steps; optimizer.on_spike=skip leaves such updates out, "
            "rollback goes back to a checkpoint and on without their samples"
        )
    if events > most:
        return (
            f"This is spike number {events}, optimizer.spike.max_events is {most}: "
            "look at these samples, lower optimizer.lr, or raise the limit"
        )
    return None


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
