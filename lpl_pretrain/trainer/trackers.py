"""Where log lines go: metrics.jsonl always, because it is the truth; wandb when configured, as a
mirror.

A resumed run appends: when a step appears twice, the last line counts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.runtime.atomic import add_path_to_oserror
from lpl_pretrain.runtime.mirror import Mirror


class Trackers:
    """Writes on rank 0 and is silent elsewhere."""

    def __init__(
        self,
        run_dir: RunDir,
        config: TrainConfig,
        rank: int,
        check_ownership: Callable[[], None] = lambda: None,
    ) -> None:
        """`check_ownership` does not return where the run is another process's by now."""
        self.check_ownership = check_ownership
        self.file = self.mirror = None
        self.begun_before = run_dir.has_logged_steps()
        if rank != 0:
            return
        self.path = run_dir.metrics
        with add_path_to_oserror(self.path):
            self.file = self.path.open("a", buffering=1)
            if not ends_with_newline(self.path):
                self.file.write("\n")
        if config.log.wandb.mode != "disabled":
            self.mirror = Mirror(
                run_dir.path,
                config.name,
                **config.log.wandb.model_dump(),
                settings=config.model_dump(mode="json"),
            )

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._write({"step": step, "time_s": time.time(), **values})
        if self.mirror is not None:
            self.mirror.training(step, values)

    def event(self, name: str, step: int, **facts: Any) -> None:
        self._write({"event": name, "step": step, "time_s": time.time(), **facts})

    def scores(self, records: Iterable[dict[str, Any]]) -> None:
        """Of evaluations, which have written their own files."""
        for record in records:
            if self.mirror is not None:
                self.mirror.scores(record)

    def close(self) -> None:
        if self.file is not None:
            with add_path_to_oserror(
                self.path
            ):  # lines that a full disk has refused are tried again
                self.file.close()
        if self.mirror is not None:
            self.mirror.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            self.check_ownership()
            with add_path_to_oserror(self.path):
                self.file.write(json.dumps(line) + "\n")


def ends_with_newline(path: Path) -> bool:
    """Or is empty. A process that was killed, or found no space, leaves part of a line."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        return file.read() in (b"", b"\n")
