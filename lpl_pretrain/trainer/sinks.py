"""Where log lines go: metrics.jsonl always, because it is the truth; wandb when configured, as a mirror.

A resumed run appends: when a step appears twice, the last line counts.
"""

from __future__ import annotations

import json
import time
from typing import Any

from lpl_pretrain.config.load import dump
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig


class Sinks:
    """Writes on rank 0 and is silent elsewhere."""

    def __init__(self, run_dir: RunDir, config: TrainConfig, rank: int) -> None:
        self.file = self.wandb = None
        if rank != 0:
            return
        self.file = run_dir.metrics.open("a", buffering=1)
        if config.log.wandb.mode != "disabled":
            import wandb
            import yaml

            self.wandb = wandb.init(
                project=config.log.wandb.project,
                entity=config.log.wandb.entity,
                name=config.name,
                id=config.name,
                resume="allow",
                mode=config.log.wandb.mode,
                dir=str(run_dir.path),
                config=yaml.safe_load(dump(config)),
            )

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._write({"step": step, "time_s": time.time(), **values})
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def event(self, name: str, step: int, **facts: Any) -> None:
        self._write({"event": name, "step": step, "time_s": time.time(), **facts})

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
