"""TensorBoard: event files in the run's folder `tensorboard`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lpl_pretrain.trackers.tracker import score_values


class TensorBoardTracker:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # not needed for --help

        self._make_writer = SummaryWriter
        self._folder = folder / "tensorboard"
        self._writer: Any = None

    def metrics(self, step: int, values: dict[str, float]) -> None:
        writer = self._open(step)
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def event(self, name: str, step: int, details: dict[str, Any]) -> None:
        self._open(step).add_text(f"events/{name}", json.dumps(details), step)

    def score(self, record: dict[str, Any]) -> None:
        writer = self._open(None)
        for name, value in score_values(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, step: int | None) -> Any:
        """Writer; opened at `step`, it hides values that an earlier start wrote from there on."""
        if self._writer is None:
            self._writer = self._make_writer(str(self._folder), purge_step=step)
        return self._writer
