"""Selection of trackers by the configuration; a new tracker needs a builder and a name."""

from typing import get_args

import pytest

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.tracking import LogConfig, TrackerName
from lpl_pretrain.trackers import build
from lpl_pretrain.trackers.build import TRACKERS, Trackers
from tests.support.configs import train_config


def test_every_name_has_a_builder():
    assert set(get_args(TrackerName)) == TRACKERS.keys()


def test_wandb_needs_a_mode():
    with pytest.raises(ValueError, match="trackers names wandb, but wandb.mode=disabled"):
        LogConfig(trackers=["wandb"])
    for names in ((), ("wandb",)):
        log = LogConfig(trackers=names, wandb={"mode": "offline"})
        assert log.active_trackers == ("wandb",)
    assert LogConfig(trackers=["tensorboard"]).active_trackers == ("tensorboard",)


class Recorder:
    """A new tracker."""

    calls = []

    def metrics(self, step, values):
        self.calls.append(("metrics", step, values))

    def event(self, name, step, details):
        self.calls.append((name, step, details))

    def score(self, record):
        self.calls.append(("score", record["step"]))

    def close(self):
        self.calls.append("closed")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_new_tracker_gets_everything_on_rank_0(tmp_path, monkeypatch, rank):
    monkeypatch.setitem(TRACKERS, "tensorboard", lambda run_dir, config, training: Recorder())
    monkeypatch.setattr(Recorder, "calls", [])
    assert build.TRACKERS is TRACKERS
    config = train_config(log={"trackers": ["tensorboard"]})
    trackers = Trackers(RunDir(tmp_path), config, rank)
    trackers.metrics(1, {"loss/total": 2.0})
    trackers.event("resumed", 1, world_size=4)
    trackers.scores([{"step": 1}])
    trackers.close()
    expected = [
        ("metrics", 1, {"loss/total": 2.0}),
        ("resumed", 1, {"world_size": 4}),
        ("score", 1),
        "closed",
    ]
    assert Recorder.calls == ([] if rank else expected)
