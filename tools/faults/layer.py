"""Compiles the fault-injecting file layer (layer.c) and keeps its controls: the plan of a process,
what happened, the full disk.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.faults.plan import FileFault

SOURCE = Path(__file__).with_name("layer.c")
FULL_DISK = 0
"""The number under which other processes report a disk that one of them found full."""


@dataclass(frozen=True)
class Hit:
    number: int
    pid: int
    rank: int
    op: str
    action: str
    path: str


class FileLayer:
    """`folder` is outside `root`; faults happen below `root` alone."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.hits_file, self.full_file = root, folder / "hits", folder / "full"
        self.shared_object = folder / "layer.so"
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise FileNotFoundError(
                "no C compiler (cc, gcc or clang), which the fault-injecting file layer needs"
            )
        subprocess.run(
            [
                compiler,
                "-O2",
                "-shared",
                "-fPIC",
                "-o",
                self.shared_object,
                SOURCE,
                "-ldl",
                "-lpthread",
            ],
            check=True,
        )

    def environment(
        self, faults: Sequence[FileFault], first: int = 1, *, trace: bool = False
    ) -> dict[str, str]:
        """Of a process with these faults, which count from `first`."""
        return {
            "LPL_CHAOS_ROOT": str(self.root),
            "LPL_CHAOS_HITS": str(self.hits_file),
            "LPL_CHAOS_FULL": str(self.full_file),
            "LPL_CHAOS_PLAN": ";".join(
                fault.entry(number) for number, fault in enumerate(faults, start=first)
            ),
            "LD_PRELOAD": str(self.shared_object),
            **({"LPL_CHAOS_TRACE": "1"} if trace else {}),
        }

    def clear(self) -> None:
        """Between attempts: there is room again."""
        self.hits_file.unlink(missing_ok=True)
        self.full_file.unlink(missing_ok=True)

    def hits(self) -> list[Hit]:
        return [
            Hit(int(number), int(pid), int(rank), op, action, path)
            for number, pid, rank, op, action, path in self._lines()
        ]

    def trace(self) -> list[tuple[int, str, str]]:
        """(rank, operation, path) of every call, where that was asked for."""
        return [
            (int(rank), op, path)
            for number, _, rank, op, _, path in self._lines("trace")
            if number == "trace"
        ]

    def _lines(self, kind: str = "hit") -> list[list[str]]:
        if not self.hits_file.exists():
            return []
        lines = self.hits_file.read_text(errors="replace").splitlines()
        found = [
            line.split(" ", 5) for line in lines if line.startswith("trace ") == (kind == "trace")
        ]
        return [words for words in found if len(words) == 6]
