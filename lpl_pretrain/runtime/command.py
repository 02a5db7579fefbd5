"""Command line that started this process, for messages that tell how to resume."""

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
    """Returns the command for a shell in the same folder.

    In a worker of torchrun it is torchrun's command, if that can be read.
    """
    arguments = sys.argv
    if World.under_torchrun():
        parent = Path(f"/proc/{os.getppid()}/cmdline")
        if parent.is_file():
            parent_arguments = os.fsdecode(parent.read_bytes()).split("\0")[1:-1]
            if any(Path(argument).name in TORCHRUN for argument in parent_arguments):
                arguments = parent_arguments
    return shlex.join(shorten(arguments))


def shorten(arguments: Sequence[str]) -> list[str]:
    """Strips the folder of a program that the shell finds by its name."""
    first, *rest = arguments
    if first.startswith("-"):
        return ["python", *arguments]
    module = "/".join(Path(first).parts[-2:])
    if module in MODULES:
        return ["python", "-m", MODULES[module], *rest]
    return [Path(first).name, *rest]
