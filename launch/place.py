"""What the commands do once their input is checked: submit it, or show what would be submitted."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click

from launch.profile import ClusterProfile
from lpl_pretrain.config.evaluation import check_protocol
from lpl_pretrain.config.load import dump, load_config
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError


def place(
    kind: str,
    argv: list[str],
    run_dir: Path,
    nodes: int,
    profile: ClusterProfile,
    shown: str | None,
    *,
    after: str | None = None,
    part: str = "",
) -> str:
    """Gives the job's id; with `shown`, a configuration, nothing is submitted."""
    from launch.submit import Order, script, submit

    order = Order(kind, argv, run_dir, nodes, after, part)
    if shown is not None:
        command = f"python -m {order.module} {argv}"
        click.echo(f"{script(order, profile)}\n\n# The command of every process\n# {command}\n\n# Its configuration\n{shown}")
        return "ID"
    job = submit(order, profile)
    click.echo(
        f"job {job}, {part or kind}: {nodes} nodes x {profile.processes_per_node} processes; python -m launch status {run_dir}"
    )
    return job


@dataclass(frozen=True)
class Scorer:
    """Evaluations of a run's checkpoints, in jobs."""

    protocol: str
    overrides: tuple[str, ...]
    cluster: str
    changes: tuple[str, ...]
    at_most: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        """Raises ConfigError for what could not run."""
        check_protocol(self.settings)
        _ = self.profile

    @cached_property
    def settings(self) -> EvaluateConfig:
        return load_config(EvaluateConfig, self.protocol, self.overrides)

    @cached_property
    def profile(self) -> ClusterProfile:
        return load_config(ClusterProfile, self.cluster, self.changes)

    @property
    def argv(self) -> list[str]:
        """Behind `lpl-pretrain evaluate RUN`."""
        return [str(Path(self.protocol).resolve()), *self.overrides]

    def place(self, run_dir: Path, *, after: str | None = None, dry_run: bool = False) -> None:
        """Submits the job of one process that submits the others."""
        cluster = Path(self.cluster).resolve()
        options = [f"--cluster={cluster}", f"--at-most={self.at_most}", f"--nodes={self.nodes}"]
        argv = ["watch", str(run_dir), *self.argv, *options, *(f"--set={change}" for change in self.changes)]
        shown, part = dump(self.settings) if dry_run else None, f"watch/{self.settings.name}"
        alone = self.profile.of_one_process().model_copy(update={"container": ()})  # where sbatch is
        place("watch", argv, run_dir, 1, alone, shown, after=after, part=part)

    def watch(self, run_dir: Path) -> None:
        from launch.watch import Watch

        if shutil.which("squeue") is None:
            raise ConfigError("squeue: not on the PATH: watch from a node of the cluster, or use `lpl-pretrain evaluate --watch`")
        watch = Watch(RunDir(run_dir), self.argv, self.settings.name, self.profile, self.nodes, self.at_most)
        left = watch.run()
        click.echo(f"training has ended; without a score: {left}" if left else "training has ended and everything is scored")
