"""What is logged, mirrored to Weights & Biases: the run's files stay the truth.

Training and evaluations, which may come late and out of order, have step metrics of their own, so
that nothing is dropped.  Several processes may write to one run; offline each leaves a folder,
which `wandb sync` joins by the run's id.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

TRAINING, EVALUATION = "step", "evaluation/step"


class Mirror:
    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        project: str,
        entity: str | None,
        mode: Literal["online", "offline", "disabled"],
        settings: dict[str, Any] | None = None,
    ) -> None:
        """`settings`: the configuration to show; None where another process has shown it."""
        import wandb

        self._run = wandb.init(
            project=project,
            entity=entity,
            name=name,
            id=name,
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=settings,
        )
        for metric in (TRAINING, EVALUATION):
            self._run.define_metric(metric, hidden=True)
        self._run.define_metric("*", step_metric=TRAINING)
        self._run.define_metric("evaluation/*", step_metric=EVALUATION)

    def training(self, step: int, values: dict[str, float]) -> None:
        self._run.log({TRAINING: step, **values})

    def scores(self, record: dict[str, Any]) -> None:
        """Of one evaluation's record."""
        protocol = record["protocol"]["name"]
        values = {
            f"evaluation/{protocol}/{e['metric']}/{e['weights']}_w{e['guidance_scale']:g}": e[
                "value"
            ]
            for e in record["results"]
        }
        self._run.log({EVALUATION: record["step"], **values})

    def close(self) -> None:
        self._run.finish()
