"""Resume a run from its newest sound checkpoint."""

from __future__ import annotations

from lpl_pretrain.config.dataset import changed_contents
from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.runtime.log import log
from lpl_pretrain.trackers.build import Trackers
from lpl_pretrain.trainer.assemble import Run


def restore(run: Run, trackers: Trackers) -> int:
    """Collective. Loads the newest complete checkpoint, if there is one; returns the number of
    updates it holds.
    """
    state = run.checkpoints.restore_latest(run.strategy, run.ema)
    if state is None:
        if trackers.begun_before:
            trackers.event("restarted", 0, world_size=run.world.world_size)
        return 0
    seen, now = state["stream"], run.stream.index.fingerprint
    if changed := changed_contents(seen, run.stream.index):
        raise CheckpointError(
            f"{run.run_dir.checkpoints}: trained on data {seen['fingerprint'][:12]}, but "
            f"data.folder={run.config.data.folder} is {now[:12]} (different: {', '.join(changed)}): name the "
            "folder it was trained on"
        )
    saved = sorted(state["loss_terms"])
    wanted = sorted(term.name for term in run.updater.terms if term.state())
    if saved != wanted:
        raise CheckpointError(
            f"{run.run_dir.checkpoints}: state.json of step {state['step']} has the state of loss "
            f"terms {saved}, the run trains with {wanted}: resume with the same terms, or start "
            "another run from its weights (init_from)"
        )
    run.load_state(state)
    trackers.event("resumed", state["step"], world_size=run.world.world_size)
    log.info("resumed at step %d of %d", state["step"], run.config.steps)
    return state["step"]
