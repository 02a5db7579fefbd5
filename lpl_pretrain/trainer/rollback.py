"""Rollback after a spike: restore an earlier checkpoint and skip the samples up to and including
those of the spike.

Update number `step` (from 0) trains on the samples at position `step + jump_updates` of the order,
and all its draws are keyed by that position.  A rollback from position p to a checkpoint of c
updates sets jump_updates = p + skip_updates - c, so that the next update begins after the spike.
Every checkpoint holds jump_updates, so a resumed run needs nothing else.  The samples
between the checkpoint and the spike are not used in this epoch either.

Only checkpoints at multiples of checkpoint.every_steps are restored: those written when a run was
stopped would make an interrupted run differ from an uninterrupted one.  A process that ends
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
    """Start of the loop: updates made before it, and the spike that was rolled back, if any."""

    step: int
    spike: Spike | None = None


def recover(run: Run, trackers: Trackers, spike: Spike) -> Start | None:
    """Collective. Follow optimizer.on_spike and log an event; raises SpikeError to stop.

    None: the update is skipped, and training goes on with the next one.
    """
    config = run.config.optimizer
    guard = run.updater.spikes
    start = None
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
    """Reason to stop, with the remedy; None when it goes on after `events` spikes."""
    max_events = config.spike.max_events
    if config.on_spike is OnSpike.STOP:
        return (
            "Parameters and moments are as before this step. Look at these samples, lower "
            "optimizer.lr or raise optimizer.warmup_steps; optimizer.on_spike=skip leaves such "
            "updates out, rollback goes back to a checkpoint and on without their samples"
        )
    if events > max_events:
        return (
            f"This is spike number {events}, optimizer.spike.max_events is {max_events}: "
            "look at these samples, lower optimizer.lr, or raise the limit"
        )
    return None


def roll_back(run: Run, spike: Spike) -> Start | None:
    """Collective. Restore the newest checkpoint due before the spike; None without one."""
    guard = run.updater.spikes
    position = spike.step - 1 + run.jump_updates
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
