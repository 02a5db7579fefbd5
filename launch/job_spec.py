"""What is submitted, whatever it is submitted to."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from launch.folder import JobFolder

CONFIG_AT = {"train": 1, "encode": 1, "evaluate": 2, "watch": 2}
"""Where in a command the file stands that configures it; overrides follow, and then options."""


@dataclass(frozen=True)
class JobSpec:
    """A job to be."""

    kind: str
    """train, encode, evaluate, sample or watch."""
    argv: list[str]
    """Behind `lpl-pretrain`, or behind `python -m launch` for watch."""
    run_dir: Path
    nodes: int
    after: str | None = None
    """A dependency in sbatch's words: `afterok:ID` begins when that job has ended well, and never
    if it has not.
    """
    part: str = ""
    """Tells work of one kind on one run from another's."""
    split: tuple[int, int] = (0, 1)
    """Which one it is of how many that do the work together, each as it comes."""
    config: str = ""
    """The configuration that `argv` means, resolved, as YAML; "" for a command without one."""
    cwd: str = field(default_factory=os.getcwd)
    """Where relative paths begin."""

    @property
    def module(self) -> str:
        return "launch" if self.kind == "watch" else "lpl_pretrain"

    @property
    def command(self) -> list[str]:
        """What the job runs: `argv` on the configuration as it was at submission, which its folder
        keeps.

        So the job means what was checked, whatever becomes of the files until it starts.
        """
        if not self.config:
            return self.argv
        at = CONFIG_AT[self.kind]
        options = [word for word in self.argv[at + 1 :] if word.startswith("--")]
        return [*self.argv[:at], str(self.folder.config), *options]

    @property
    def array_dir(self) -> Path:
        """What an array is about, of which this may be a task: the runs of a sweep, or one piece of
        work.
        """
        return self.run_dir.parent if self.kind == "train" else self.run_dir

    @property
    def folder(self) -> JobFolder:
        """Of training it is RUN/launch; other work on a run has folders beside each other."""
        parent = self.run_dir / "launch"
        return JobFolder(parent if self.kind == "train" else parent / (self.part or self.kind))
