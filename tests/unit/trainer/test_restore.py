"""A training run goes on only from a state that is its own."""

from __future__ import annotations

import pytest
import torch

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import assemble
from lpl_pretrain.trainer.resume import restore
from tests.support.checkpoints import edit
from tests.support.configs import train_config
from tests.support.latents import tiny_dataset


class NoTrackers:
    def event(self, *arguments, **values) -> None:
        pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda state: state.update(
                loss_terms={"lpl": {"frozen": 1.0, "diffusion_sum": 0.0, "perceptual_sum": 0.0}}
            ),
            r"has the state of loss terms \['lpl'\], the run trains with \[\]",
        ),
        (
            lambda state: state["stream"].update(fingerprint="x", contents={"shards": "x"}),
            "trained on data x, but data.folder=",
        ),
        (lambda state: state.pop("skipped_updates") and None, "all 1 checkpoints are damaged"),
        (lambda state: state["stream"].pop("seed") and None, "all 1 checkpoints are damaged"),
        (lambda state: state["loss_scale"].update(value=-1.0), "all 1 checkpoints are damaged"),
        (lambda state: state.update(step=7), "all 1 checkpoints are damaged"),
    ],
)
def test_a_state_of_something_else_is_refused(tmp_path, change, words):
    folder, autoencoder = tiny_dataset(tmp_path)
    config = train_config(data__folder=folder, autoencoder=autoencoder)
    run = assemble(config, RunDir(tmp_path / "run"), World(), torch.device("cpu"))
    run.checkpoints.save(6, run.strategy, run.ema, run.state(6), samples_seen=run.samples_seen(6))
    run.checkpoints.finish()
    assert restore(run, NoTrackers()) == 6
    edit(run.run_dir.checkpoint(6), "state.json", change)
    with pytest.raises(CheckpointError, match=words):
        restore(run, NoTrackers())
