"""What every command that submits shares: its options, and the end of it: to hand the job over, or
to show what would be.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
from click.core import ParameterSource

from launch.folder import JobFolder
from launch.job_spec import JobSpec
from launch.profile import ClusterProfile
from launch.record import JobRecord, read_spec
from launch.script import check_setup
from lpl_pretrain.config.evaluation import check_protocol
from lpl_pretrain.config.load import dump, load_config
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError


def on_cluster(command: Callable[..., None], *, nodes: bool = True) -> Callable[..., None]:
    """The options of every command that submits a job; `nodes`: on how many is for the user to say."""
    options = [
        click.option("--cluster", required=True, metavar="PROFILE", help="configs/cluster/*.yaml"),
        *(
            [click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True)]
            if nodes
            else []
        ),
        click.option(
            "--set",
            "changes",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a key of the profile.",
        ),
        click.option(
            "--dry-run",
            is_flag=True,
            help="Print the script and the resolved configuration, and submit nothing.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def as_given(context: click.Context, command: click.Command) -> list[str]:
    """The options of `command` that the user gave, as words of a command line."""
    words: list[str] = []
    for option in command.params:
        if (
            isinstance(option, click.Option)
            and context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        ):
            value = context.params[str(option.name)]
            for one in value if option.multiple else [value]:
                words += [option.opts[0], *map(str, one if option.nargs > 1 else [one])]
    return words


def submit_or_preview(spec: JobSpec, profile: ClusterProfile, shown: str | None) -> str:
    """Submits and gives the job's id, or shows what would be submitted, with the configuration
    `shown`.
    """
    from launch.submit import script, submit

    if shown is not None:
        command = f"python -m {spec.module} {shlex.join(spec.argv)}"
        click.echo(f"{script(spec, profile)}\n\n# The command of every process\n# {command}\n")
        click.echo(f"# Its configuration\n{shown}")
        return "ID"
    job, kind = submit(spec, profile), spec.kind
    look = f"python -m launch status {shlex.quote(str(spec.run_dir))}"
    look = look if kind in ("train", "watch") else f"logs in {spec.folder.path}"
    click.echo(
        f"job {job}, {spec.part or kind}: {spec.nodes} nodes x {profile.processes_per_node} "
        f"processes; {look}"
    )
    return job


def submit_or_preview_array(
    specs: Sequence[JobSpec],
    profile: ClusterProfile,
    at_most: int | None = None,
    *,
    shown: str | None = None,
) -> list[str]:
    """As `place`, of the runs of a sweep, or of shares of one piece of work: they need the same
    nodes; gives the tasks' names.
    """
    from launch.array import array_batch_script, submit_array

    folder, nodes = specs[0].array_dir, specs[0].nodes
    if shown is not None:
        listed = [
            f"# {number}: lpl-pretrain {shlex.join(spec.argv)}" for number, spec in enumerate(specs)
        ]
        click.echo(
            "\n".join(
                [
                    array_batch_script(specs, profile, at_most, folder / "launch" / "array"),
                    "\n# The tasks",
                    *listed,
                ]
            )
        )
        click.echo(f"\n# Their configuration\n{shown}" if shown else "")
        return [f"ID_{number}" for number in range(len(specs))]
    jobs = submit_array(specs, profile, at_most)
    for job, spec in zip(jobs, specs, strict=True):
        click.echo(f"job {job}, {spec.part or spec.run_dir.name}")
    each = f"{nodes} nodes x {profile.processes_per_node} processes"
    click.echo(
        f"{len(specs)} jobs, each {each}; python -m launch status {shlex.quote(str(folder))}"
    )
    return jobs


def submit_or_preview_encoding(
    config: str,
    output: Path,
    nodes: int,
    profile: ClusterProfile,
    shown: str | None,
    *overrides: str,
    resolved: str = "",
) -> str:
    """A job for each node, for they need not begin at once, and one that is preempted stops no
    other; gives the array's id.

    `resolved`: the configuration that the jobs use, as YAML.
    """
    argv = ["encode", str(Path(config).resolve()), *overrides]
    specs = [
        JobSpec("encode", argv, output, 1, part=f"encode/{n}", split=(n, nodes), config=resolved)
        for n in range(nodes)
    ]
    return submit_or_preview_array(specs, profile, shown=shown)[0].partition("_")[0]


def resubmit(folder: JobFolder) -> None:
    """The newest job of a folder, as it was."""
    spec, record = read_spec(folder)
    submit_or_preview(spec, record.profile, None)


def resubmit_array(folders: Sequence[JobFolder]) -> None:
    """The newest jobs of runs of a sweep: an array of those that had asked for the same."""
    alike: dict[str, tuple[JobRecord, list[JobSpec]]] = {}
    for folder in folders:
        spec, record = read_spec(folder)
        shape = record.model_dump_json(include={"profile", "nodes", "at_most", "cwd"})
        alike.setdefault(shape, (record, []))[1].append(spec)
    for record, specs in alike.values():
        submit_or_preview_array(specs, record.profile, record.at_most)


@dataclass(frozen=True)
class EvaluationLauncher:
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
        if self.settings.name == "launch":
            raise ConfigError(
                "name=launch: the folders of jobs are called so: give the protocol another name"
            )
        check_setup(self.profile.setup)

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

    def submit_or_preview(
        self, run_dir: Path, *, after: str | None = None, dry_run: bool = False
    ) -> None:
        """Submits the job of one process that submits the others."""
        cluster = Path(self.cluster).resolve()
        options = [f"--cluster={cluster}", f"--at-most={self.at_most}", f"--nodes={self.nodes}"]
        argv = [
            "watch",
            str(run_dir),
            *self.argv,
            *options,
            *(f"--set={change}" for change in self.changes),
        ]
        alone = self.profile.of_one_process().model_copy(
            update={"container": ()}
        )  # where sbatch is
        part = f"watch/{self.settings.name}"
        spec = JobSpec("watch", argv, run_dir, 1, after, part, config=dump(self.settings))
        submit_or_preview(spec, alone, spec.config if dry_run else None)

    def watch(self, run_dir: Path) -> None:
        from launch.watch import EvaluationWatcher

        if shutil.which("squeue") is None:
            raise ConfigError(
                "squeue: not on the PATH: watch from a node of the cluster, or use `lpl-pretrain "
                "evaluate --watch`"
            )
        config = dump(self.settings)
        watch = EvaluationWatcher(
            RunDir(run_dir),
            self.argv,
            self.settings.name,
            self.profile,
            self.nodes,
            self.at_most,
            config,
        )
        left = watch.run()
        click.echo(
            f"training has ended; without a score: {left}"
            if left
            else "training has ended and everything is scored"
        )
