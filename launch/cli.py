"""Commands of `python -m launch`: each parses its options, checks what a login node can check, and
calls one function.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from launch.evaluation_jobs import EvaluationLauncher
from launch.job import JobSpec
from launch.job_folder import JobFolder, find_job_folders
from launch.monitor import cancel as cancel_jobs
from launch.monitor import status_report, stream_logs, unfinished_runs
from launch.options import Target, given_options, on_cluster
from launch.script_checks import resolve_path
from launch.slurm import job_states
from launch.submit import (
    resubmit,
    resubmit_array,
    submit_or_preview,
    submit_or_preview_array,
    submit_or_preview_encoding,
)
from launch.sweep import plan_runs
from lpl_pretrain.cli.main import run, sampler_of
from lpl_pretrain.cli.main import sample as SAMPLE
from lpl_pretrain.config.load import dump, load_config
from lpl_pretrain.config.override import as_override
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError

RUN = click.argument("run", callback=lambda _context, _argument, given: resolve_path(given, "RUN"))
AT_MOST = click.option(
    "--at-most",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Evaluation jobs at a time.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def commands() -> None:
    """Start the commands of lpl-pretrain on a SLURM cluster.

    \b
    python -m launch train    configs/train/dit_xl2_in256.yaml --cluster PROFILE --nodes 4
    python -m launch status   runs/dit_xl2_in256
    python -m launch sample   runs/dit_xl2_in256 --guidance-scale 4 --cluster PROFILE
    python -m launch logs     runs/dit_xl2_in256 -f
    python -m launch evaluate runs/dit_xl2_in256 PROTOCOL --watch --cluster PROFILE

    PROFILE is a file such as configs/cluster/slurm.yaml, PROTOCOL one such as
    configs/evaluate/in256_50k.yaml.
    """


@commands.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
@on_cluster
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="KEY=VALUE,VALUE",
    help="A run for each value, or combination of values.",
)
@click.option(
    "--sweep-at-most", type=click.IntRange(min=1), metavar="N", help="Runs of a sweep at a time."
)
@click.option(
    "--evaluate-with",
    metavar="PROTOCOL",
    help="Also submit an evaluation job for every checkpoint, as it comes.",
)
@click.option(
    "--evaluate-cluster",
    metavar="PROFILE",
    help="Where those run, each on one node; as --cluster when absent.",
)
@AT_MOST
def train(
    config: str,
    overrides: tuple[str, ...],
    sweeps: tuple[str, ...],
    sweep_at_most: int | None,
    evaluate_with: str | None,
    evaluate_cluster: str | None,
    at_most: int,
    target: Target,
) -> None:
    """Train CONFIG; a run that exists is continued."""
    from lpl_pretrain.config.evaluation import check_sampler

    ranks = target.nodes * target.profile.processes_per_node
    runs = plan_runs(config, overrides, sweeps, ranks)
    evaluations = None
    if evaluate_with is not None:
        cluster = evaluate_cluster or target.cluster
        changes = () if evaluate_cluster else target.changes
        evaluations = EvaluationLauncher(evaluate_with, (), cluster, changes, at_most)
        for run in runs:
            check_sampler(run.settings.diffusion.prediction, evaluations.settings.sampler)
    specs = []
    for run in runs:
        message = run.finished_message()
        if message is None:
            specs.append(run.job_spec(target.nodes))
        else:
            click.echo(f"{run.run_dir}: {message}")
    dependencies: dict[Path, str] = {}
    if sweeps and specs:
        jobs = submit_or_preview_array(specs, target.profile, sweep_at_most, dry_run=target.dry_run)
        dependencies = {spec.run_dir: f"after:{job}" for spec, job in zip(specs, jobs, strict=True)}
    elif specs:
        submit_or_preview(specs[0], target.profile, dry_run=target.dry_run)
    if evaluations is not None:  # also for finished runs: checkpoints may have no score yet
        for run in runs:
            dependency = dependencies.get(run.run_dir)
            evaluations.submit_watcher(run.run_dir, dependency=dependency, dry_run=target.dry_run)


@commands.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
@on_cluster
def encode(config: str, overrides: tuple[str, ...], target: Target) -> None:
    """Encode CONFIG, in one job for each node; finished shards are kept."""
    from lpl_pretrain.config.encode import EncodeConfig

    profile = target.profile
    settings = load_config(EncodeConfig, config, overrides)
    output = resolve_path(settings.output, "output")
    text = dump(settings.model_copy(update={"output": str(output)}))
    argv = ["encode", str(Path(config).resolve()), *overrides, as_override("output", str(output))]
    submit_or_preview_encoding(argv, output, target.nodes, profile, text, dry_run=target.dry_run)


@commands.command()
@RUN
@click.argument("protocol")
@click.argument("overrides", nargs=-1)
@click.option(
    "--watch",
    "watching",
    is_flag=True,
    help="A job for every checkpoint, as it comes, until training has ended.",
)
@AT_MOST
@on_cluster
def evaluate(
    run: Path,
    protocol: str,
    overrides: tuple[str, ...],
    watching: bool,
    at_most: int,
    target: Target,
) -> None:
    """Score the checkpoints of RUN that have no score by PROTOCOL yet: in one job, or with --watch
    each in its own as they come.
    """
    evaluations = EvaluationLauncher(
        protocol, overrides, target.cluster, target.changes, at_most, target.nodes
    )
    if watching:
        evaluations.submit_watcher(run, dry_run=target.dry_run)
        return
    argv = ["evaluate", str(run), *evaluations.argv]
    spec = JobSpec("evaluate", argv, run, target.nodes, config=dump(evaluations.settings))
    submit_or_preview(spec, evaluations.profile, dry_run=target.dry_run)


@commands.command()
@RUN
@click.argument("protocol")
@click.argument("overrides", nargs=-1)
@AT_MOST
@on_cluster
def watch(
    run: Path, protocol: str, overrides: tuple[str, ...], at_most: int, target: Target
) -> None:
    """Do here what the job of `evaluate --watch` does, where jobs may not submit jobs: submit an
    evaluation for each checkpoint of RUN.
    """
    evaluations = EvaluationLauncher(
        protocol, overrides, target.cluster, target.changes, at_most, target.nodes
    )
    evaluations.watch(run)


@commands.command()
@click.option("--encode", "encoding", required=True, metavar="CONFIG", help="configs/encode/*.yaml")
@click.option(
    "--train",
    "training",
    required=True,
    metavar="CONFIG",
    help="configs/train/*.yaml; its data are what was encoded.",
)
@click.option("--evaluate", "protocol", metavar="PROTOCOL", help="configs/evaluate/*.yaml")
@click.argument("overrides", nargs=-1)
@on_cluster
def pipeline(
    encoding: str, training: str, protocol: str | None, overrides: tuple[str, ...], target: Target
) -> None:
    """Encode, verify, train and score, each after the one before has succeeded; OVERRIDES change
    the training configuration.
    """
    from launch.pipeline import submit_pipeline

    submit_pipeline(encoding, training, protocol, overrides, target)


@commands.command(params=list(SAMPLE.params))
@partial(on_cluster, nodes=False)
@click.pass_context
def sample(context: click.Context, run: str, target: Target, **options: Any) -> None:
    """Draw images from the EMA weights of RUN, as one process: the options of `lpl-pretrain
    sample`.
    """
    from lpl_pretrain.cli.sample import check

    profile = target.profile
    run_dir = resolve_path(run, "RUN")
    checked = ("step", "images", "guide", "guide_step", "text_encoders")
    given = {name: options[name] for name in checked}
    _, sampler, *_ = check(RunDir(run_dir), sampler=sampler_of(options), **given)
    argv = ["sample", str(run_dir), *given_options(context, SAMPLE)]
    one_gpu = {"processes_per_node": 1, "gpus_per_node": min(1, profile.gpus_per_node)}
    submit_or_preview(
        JobSpec("sample", argv, run_dir, 1),
        profile.model_copy(update=one_gpu),
        dry_run=target.dry_run,
        settings=dump(sampler),
    )


@commands.command()
@RUN
def status(run: Path) -> None:
    """Show what the job of RUN is doing, by its files and SLURM's queue; one line for each job of a
    sweep or an encoding.
    """
    click.echo(status_report(run))


@commands.command()
@RUN
@click.option("-f", "--follow", is_flag=True, help="Print new lines until the job has ended.")
def logs(run: Path, follow: bool) -> None:
    """Print the logs of all ranks, each line with its rank."""
    for line in stream_logs(run, follow=follow):
        click.echo(line)


@commands.command()
@RUN
def cancel(run: Path) -> None:
    """End the job of RUN after a checkpoint, without a requeue; `resume` continues it.  Of a sweep
    or an encoding, end all jobs.
    """
    click.echo(cancel_jobs(run))


@commands.command()
@RUN
def resume(run: Path) -> None:
    """Submit the newest job of RUN again, unchanged, and the job that evaluates its checkpoints.

    Of a sweep, submit all runs that ended early.
    """
    folders = find_job_folders(run)
    if folders[0].read_raw_record().get("kind") == "encode":
        raise ConfigError(
            f"{run}: holds latents: run `launch encode` again; finished shards are kept"
        )
    if len(folders) == 1:
        resubmit(folders[0])
    else:
        folders = unfinished_runs(folders)
        if not folders:
            raise ConfigError(f"{run}: all its runs are complete, or in SLURM's queue")
        resubmit_array(folders)
    watchers = [
        JobFolder(path.parent)
        for folder in folders
        for path in sorted(folder.path.glob("watch/*/job.json"))
    ]
    for watcher, state in zip(watchers, job_states(watchers), strict=True):
        if not state:
            resubmit(watcher)


def main() -> None:
    """Entry point of `python -m launch` and of the console script lpl-launch."""
    run(commands)
