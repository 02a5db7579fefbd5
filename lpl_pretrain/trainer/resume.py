"""Goes on from the newest sound checkpoint of a run, where there is one."""

from __future__ import annotations

from lpl_pretrain.config.dataset import changed_contents
from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.runtime.log import log
from lpl_pretrain.trainer.assemble import Run
from lpl_pretrain.trainer.trackers import Trackers


def restore(run: Run, sinks: Trackers) -> int:
    """Collective. Loads the newest complete checkpoint, if there is one; returns the number of
    updates it holds.
    """
    state = run.checkpoints.restore_latest(run.strategy, run.ema)
    if state is None:
        if sinks.begun_before:
            sinks.event("restarted", 0, world_size=run.world.world_size)
        return 0
    seen, now = state["stream"], run.stream.index.fingerprint
    if changed := changed_contents(seen, run.stream.index):
        raise CheckpointError(
            f"{run.run_dir.checkpoints}: trained on data {seen['fingerprint'][:12]}, but "
            "data.folder="
            f"{run.config.data.folder} is {now[:12]} (different: {', '.join(changed)}): name the "
            "folder it was trained on"
        )
    if (run.updater.perceptual is None) != (state["lpl_weight"] is None):
        raise CheckpointError(
            f"{run.run_dir.checkpoints}: state.json of step {state['step']} has "
            f"lpl_weight={state['lpl_weight']}, "
            f"the run trains {'without' if run.updater.perceptual is None else 'with'} LPL"
        )
    run.load_state(state)
    sinks.event("resumed", state["step"], world_size=run.world.world_size)
    log.info("resumed at step %d of %d", state["step"], run.config.steps)
    return state["step"]
