"""Compiles the fault-injecting file layer (layer.c), sets its plan and reads its log."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.faults.plan import FileFault

SOURCE = Path(__file__).with_name("layer.c")
FULL_DISK = 0
"""Fault number that processes log when another process has filled the disk."""


@dataclass(frozen=True)
class Hit:
    """A fault that happened: its number in the plan, and the call it hit."""

    number: int
    pid: int
    rank: int
    op: str
    action: str
    path: str


class FileLayer:
    """Injects faults into file calls below `root`; its control files are in `folder`, outside."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root = root
        self.hits_file = folder / "hits"
        self.full_file = folder / "full"
        self.shared_object = folder / "layer.so"
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise FileNotFoundError(
                "no C compiler split_lines (cc, gcc or clang): install one to build the file layer"
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
        """Environment of a process with these faults, numbered from `first`."""
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
        """Clear the log and the full disk between attempts."""
        self.hits_file.unlink(missing_ok=True)
        self.full_file.unlink(missing_ok=True)

    def hits(self) -> list[Hit]:
        return [
            Hit(int(number), int(pid), int(rank), op, action, path)
            for number, pid, rank, op, action, path in self._lines()
        ]

    def trace(self) -> list[tuple[int, str, str]]:
        """(rank, operation, path) of every call, if the process ran with trace=True."""
        return [
            (int(rank), op, path)
            for number, _, rank, op, _, path in self._lines("trace")
            if number == "trace"
        ]

    def _lines(self, kind: str = "hit") -> list[list[str]]:
        if not self.hits_file.exists():
            return []
        lines = self.hits_file.read_text(errors="replace").splitlines()
        split_lines = [
            line.split(" ", 5) for line in lines if line.startswith("trace ") == (kind == "trace")
        ]
        return [words for words in split_lines if len(words) == 6]
