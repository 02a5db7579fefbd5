"""Resume a run from its newest sound checkpoint."""

from __future__ import annotations

from lpl_pretrain.config.dataset import changed_contents
from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.runtime.log import log
from lpl_pretrain.trackers.build import Trackers
from lpl_pretrain.trainer.assemble import Run


def restore(run: Run, trackers: Trackers) -> int:
    """Collective. Load the newest complete checkpoint; the number of updates it holds, 0 without.

    Raises CheckpointError.
    """
    state = run.checkpoints.restore_latest(run.strategy, run.ema)
    if state is None:
        if trackers.begun_before:
            trackers.event("restarted", 0, world_size=run.world.world_size)
        return 0
    saved_data = state["stream"]
    fingerprint = run.stream.index.fingerprint
    if changed := changed_contents(saved_data, run.stream.index):
        raise CheckpointError(
            f"{run.run_dir.checkpoints}: trained on data {saved_data['fingerprint'][:12]}, "
            f"but data.folder={run.config.data.folder} is {fingerprint[:12]} "
            f"(different: {', '.join(changed)}): name the folder it was trained on"
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
