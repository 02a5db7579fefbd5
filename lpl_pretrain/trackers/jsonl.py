"""metrics.jsonl: one JSON object per line.  Every run has it; reports and early warnings read it.

A resumed run appends: when a step appears twice, the last line counts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lpl_pretrain.runtime.atomic import add_path_to_oserror


class JsonlTracker:
    def __init__(self, path: Path, check_ownership: Callable[[], None] = lambda: None) -> None:
        """`check_ownership`, called before every line, exits if the run's lease was taken over."""
        self.path = path
        self.check_ownership = check_ownership
        with add_path_to_oserror(path):
            self.file = path.open("a", buffering=1)
            if not ends_with_newline(path):
                self.file.write("\n")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._write({"step": step, "time_s": time.time(), **values})

    def event(self, name: str, step: int, details: dict[str, Any]) -> None:
        self._write({"event": name, "step": step, "time_s": time.time(), **details})

    def score(self, record: dict[str, Any]) -> None:
        """Scores have files of their own, which the evaluation has written."""

    def close(self) -> None:
        with add_path_to_oserror(self.path):  # lines that a full disk has refused are tried again
            self.file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self.check_ownership()
        with add_path_to_oserror(self.path):
            self.file.write(json.dumps(line) + "\n")


def ends_with_newline(path: Path) -> bool:
    """Whether a file is empty or its last line is complete.

    A kill or a full disk leaves part of a line.
    """
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        return file.read() in (b"", b"\n")
