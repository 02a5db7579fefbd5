"""Trackers of a run.  metrics.jsonl is always written; `log.trackers` names the others.

A new tracker is one file with a `Tracker`, an entry in `TRACKERS`, and its name in
config/tracking.py's `TrackerName`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.tracking import TrackerName
from lpl_pretrain.trackers.jsonl import JsonlTracker
from lpl_pretrain.trackers.tensorboard import TensorBoardTracker
from lpl_pretrain.trackers.tracker import Tracker
from lpl_pretrain.trackers.wandb import WandbTracker


def build_wandb(run_dir: RunDir, config: TrainConfig, *, training: bool) -> Tracker:
    settings = config.model_dump(mode="json") if training else None
    return WandbTracker(run_dir.path, config.name, config.log.wandb, settings)


def build_tensorboard(run_dir: RunDir, config: TrainConfig, *, training: bool) -> Tracker:
    return TensorBoardTracker(run_dir.path)


TRACKERS: dict[TrackerName, Callable[..., Tracker]] = {
    "tensorboard": build_tensorboard,
    "wandb": build_wandb,
}


def build_trackers(run_dir: RunDir, config: TrainConfig, *, training: bool) -> list[Tracker]:
    """The trackers that the configuration names, but for metrics.jsonl.

    `training`: False in an evaluation, which adds scores to what its training has begun.
    """
    return [
        TRACKERS[name](run_dir, config, training=training) for name in config.log.active_trackers
    ]


class Trackers:
    """All trackers of a training run; writes on rank 0 and is silent elsewhere."""

    def __init__(
        self,
        run_dir: RunDir,
        config: TrainConfig,
        rank: int,
        check_ownership: Callable[[], None] = lambda: None,
    ) -> None:
        """`check_ownership` exits the process if the run's lease was taken over."""
        self.begun_before = run_dir.has_logged_steps()
        self._trackers: list[Tracker] = []
        if rank == 0:
            self._trackers.append(JsonlTracker(run_dir.metrics, check_ownership))
            self._trackers += build_trackers(run_dir, config, training=True)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.metrics(step, values)

    def event(self, name: str, step: int, **details: Any) -> None:
        for tracker in self._trackers:
            tracker.event(name, step, details)

    def scores(self, records: Iterable[dict[str, Any]]) -> None:
        """Records of evaluations; consumed on all ranks, because computing them is collective."""
        for record in records:
            for tracker in self._trackers:
                tracker.score(record)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
