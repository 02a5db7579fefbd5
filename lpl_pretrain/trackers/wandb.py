"""Weights & Biases.

Training and evaluations, which may come late and out of order, have step metrics of their own, so
that no value is dropped.  Several processes may write to one wandb run; offline each leaves a
folder, and `wandb sync` joins them by the run's id.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lpl_pretrain.config.tracking import WandbConfig
from lpl_pretrain.trackers.tracker import score_values

TRAINING_STEP = "step"
EVALUATION_STEP = "evaluation/step"


class WandbTracker:
    def __init__(
        self,
        folder: Path,
        name: str,
        config: WandbConfig,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """`settings`: the run's configuration; None where another process has sent it."""
        import wandb

        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=name,
            id=name,
            resume="allow",
            mode=config.mode,
            dir=str(folder),
            config=settings,
        )
        for metric in (TRAINING_STEP, EVALUATION_STEP):
            self._run.define_metric(metric, hidden=True)
        self._run.define_metric("*", step_metric=TRAINING_STEP)
        self._run.define_metric("evaluation/*", step_metric=EVALUATION_STEP)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._run.log({TRAINING_STEP: step, **values})

    def event(self, name: str, step: int, details: dict[str, Any]) -> None:
        """Do nothing: wandb has no concept of an event."""

    def score(self, record: dict[str, Any]) -> None:
        self._run.log({EVALUATION_STEP: record["step"], **score_values(record)})

    def close(self) -> None:
        self._run.finish()
