"""The command that started this process, for messages that say how to go on."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lpl_pretrain.runtime.world import World

MODULES = {"lpl_pretrain/__main__.py": "lpl_pretrain", "launch/__main__.py": "launch"}
TORCHRUN = ("torchrun", "torch.distributed.run")


def command_line() -> str:
    """For a shell in the same folder; of a worker of torchrun, torchrun's where it can be read."""
    typed = sys.argv
    if World.by_torchrun():
        parent = Path(f"/proc/{os.getppid()}/cmdline")
        found = os.fsdecode(parent.read_bytes()).split("\0")[1:-1] if parent.is_file() else []
        if any(Path(part).name in TORCHRUN for part in found):
            typed = found
    return shlex.join(shortened(typed))


def shortened(arguments: Sequence[str]) -> list[str]:
    """Without the folders of a program that is found without them."""
    first, *rest = arguments
    if first.startswith("-"):
        return ["python", *arguments]
    module = "/".join(Path(first).parts[-2:])
    return (
        ["python", "-m", MODULES[module], *rest] if module in MODULES else [Path(first).name, *rest]
    )
