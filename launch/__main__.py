"""`python -m launch`: submit, watch, follow, cancel and go on.  Parse, check what can be checked
here, call one function.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launch.folder import JobFolder
from launch.job_spec import JobSpec
from launch.options import (
    EvaluationLauncher,
    as_given,
    on_cluster,
    resubmit,
    resubmit_array,
    submit_or_preview,
    submit_or_preview_array,
    submit_or_preview_encoding,
)
from launch.profile import ClusterProfile
from launch.script import check_folder, resolved
from lpl_pretrain.cli.main import run, sampler_of
from lpl_pretrain.cli.main import sample as SAMPLE
from lpl_pretrain.config.load import dump, load_config
from lpl_pretrain.config.override import as_override
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError

if TYPE_CHECKING:
    from lpl_pretrain.config.schema import TrainConfig

RUN = click.argument("run", callback=lambda _context, _argument, given: resolved(given, "RUN"))
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
    python -m launch train    configs/train/dit_xl2_in256.yaml --cluster configs/cluster/slurm.yaml --nodes 4
    python -m launch status   runs/dit_xl2_in256
    python -m launch sample   runs/dit_xl2_in256 --guidance-scale 4 --cluster configs/cluster/slurm.yaml
    python -m launch logs     runs/dit_xl2_in256 -f
    python -m launch evaluate runs/dit_xl2_in256 configs/evaluate/in256_50k.yaml --watch --cluster
    configs/cluster/slurm.yaml
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
    "--sweep-at-most",
    type=click.IntRange(min=1),
    metavar="N",
    help="So many of them at the same time.",
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
    cluster: str,
    nodes: int,
    changes: tuple[str, ...],
    dry_run: bool,
    sweeps: tuple[str, ...],
    sweep_at_most: int | None,
    evaluate_with: str | None,
    evaluate_cluster: str | None,
    at_most: int,
) -> None:
    """Train CONFIG; a run that was begun goes on."""
    from launch.sweep import plan_runs
    from lpl_pretrain.config.evaluation import check_sampler

    profile, scorer = load_config(ClusterProfile, cluster, changes), None
    runs = plan_runs(config, overrides, sweeps, nodes * profile.processes_per_node)
    if evaluate_with is not None:
        cluster, changes = evaluate_cluster or cluster, () if evaluate_cluster else changes
        scorer = EvaluationLauncher(evaluate_with, (), cluster, changes, at_most)
        for run in runs:
            check_sampler(run.settings.diffusion.prediction, scorer.settings.sampler)
    left = [run for run in runs if not report_if_finished(run.settings, run.run_dir)]
    begun: dict[Path, str] = {}
    if not left:
        pass  # its checkpoints may still have to be scored
    elif sweeps:
        specs = [
            JobSpec("train", run.argv, run.run_dir, nodes, config=dump(run.settings))
            for run in left
        ]
        jobs = submit_or_preview_array(specs, profile, sweep_at_most, shown="" if dry_run else None)
        begun = {run.run_dir: f"after:{job}" for run, job in zip(left, jobs, strict=True)}
    else:
        spec = JobSpec("train", left[0].argv, left[0].run_dir, nodes, config=dump(left[0].settings))
        submit_or_preview(spec, profile, spec.config if dry_run else None)
    for run in runs:
        if scorer is not None:
            scorer.submit_or_preview(run.run_dir, after=begun.get(run.run_dir), dry_run=dry_run)


def report_if_finished(settings: TrainConfig, run_dir: Path) -> bool:
    """Print why there is nothing to train, and return True, for a run that has made all its steps."""
    from lpl_pretrain.config.resume import finished

    words = finished(settings, RunDir(run_dir))
    if words is not None:
        click.echo(f"{run_dir}: {words}")
    return words is not None


@commands.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
@on_cluster
def encode(
    config: str,
    overrides: tuple[str, ...],
    cluster: str,
    nodes: int,
    changes: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Encode CONFIG, in one job for each node; what was finished is left alone."""
    from lpl_pretrain.config.encode import EncodeConfig

    profile, settings = (
        load_config(ClusterProfile, cluster, changes),
        load_config(EncodeConfig, config, overrides),
    )
    output = resolved(settings.output, "output")
    text = dump(settings.model_copy(update={"output": str(output)}))
    given = [*overrides, as_override("output", str(output))]
    submit_or_preview_encoding(
        config, output, nodes, profile, text if dry_run else None, *given, resolved=text
    )


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
    cluster: str,
    nodes: int,
    changes: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Score the checkpoints of RUN as PROTOCOL says: those that have no score yet, in one job, or
    each in its own as they come.
    """
    scorer, run_dir = EvaluationLauncher(protocol, overrides, cluster, changes, at_most, nodes), run
    if watching:
        scorer.submit_or_preview(run_dir, dry_run=dry_run)
        return
    argv = ["evaluate", str(run_dir), *scorer.argv]
    spec = JobSpec("evaluate", argv, run_dir, nodes, config=dump(scorer.settings))
    submit_or_preview(spec, scorer.profile, spec.config if dry_run else None)


@commands.command()
@RUN
@click.argument("protocol")
@click.argument("overrides", nargs=-1)
@AT_MOST
@on_cluster
def watch(
    run: Path,
    protocol: str,
    overrides: tuple[str, ...],
    at_most: int,
    cluster: str,
    nodes: int,
    changes: tuple[str, ...],
    dry_run: bool,
) -> None:
    """What `evaluate --watch` submits: submit evaluation jobs from this terminal, where jobs may
    not submit others.
    """
    EvaluationLauncher(protocol, overrides, cluster, changes, at_most, nodes).watch(run)


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
    encoding: str,
    training: str,
    protocol: str | None,
    overrides: tuple[str, ...],
    cluster: str,
    nodes: int,
    changes: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Encode, verify, train and score, each after the one before has ended well; OVERRIDES are of
    the training.
    """
    from lpl_pretrain.config.encode import EncodeConfig
    from lpl_pretrain.config.schema import TrainConfig

    profile, source = (
        load_config(ClusterProfile, cluster, changes),
        load_config(EncodeConfig, encoding, ()),
    )
    latents = resolved(source.output, "output")
    text = dump(source.model_copy(update={"output": str(latents)}))
    output = as_override("output", str(latents))
    given = [*overrides, as_override("data.folder", str(latents))]
    settings = load_config(TrainConfig, training, given)
    run_dir = resolved(settings.run_dir or f"runs/{settings.name}", "run_dir")
    settings = settings.model_copy(update={"run_dir": str(run_dir)})
    scorer = None if protocol is None else EvaluationLauncher(protocol, (), cluster, changes)
    for folder in (latents, run_dir):  # before the first part is submitted
        check_folder(folder)
    first = submit_or_preview_encoding(
        encoding, latents, nodes, profile, text if dry_run else None, output, resolved=text
    )
    argv = ["encode", str(Path(encoding).resolve()), output, "--verify"]
    check = JobSpec("encode", argv, latents, 1, f"afterok:{first}", "verify", config=text)
    checked = submit_or_preview(check, profile.of_one_process(), text if dry_run else None)
    argv = ["train", str(Path(training).resolve()), *given, as_override("run_dir", str(run_dir))]
    train = JobSpec("train", argv, run_dir, nodes, f"afterok:{checked}", config=dump(settings))
    submit_or_preview(train, profile, train.config if dry_run else None)
    if scorer is not None:
        scorer.submit_or_preview(run_dir, after=f"afterok:{checked}", dry_run=dry_run)


@commands.command(params=list(SAMPLE.params))
@partial(on_cluster, nodes=False)
@click.pass_context
def sample(
    context: click.Context,
    run: str,
    cluster: str,
    changes: tuple[str, ...],
    dry_run: bool,
    **options: Any,
) -> None:
    """Draw pictures from the EMA weights of RUN, as one process: the options of `lpl-pretrain
    sample`.
    """
    from lpl_pretrain.cli.sample import check

    profile, run_dir = load_config(ClusterProfile, cluster, changes), resolved(run, "RUN")
    asked = {
        name: options[name] for name in ("step", "images", "guide", "guide_step", "text_encoders")
    }
    _, sampler, *_ = check(RunDir(run_dir), sampler=sampler_of(options), **asked)
    argv = ["sample", str(run_dir), *as_given(context, SAMPLE)]
    alone = profile.model_copy(
        update={"processes_per_node": 1, "gpus_per_node": min(1, profile.gpus_per_node)}
    )
    submit_or_preview(
        JobSpec("sample", argv, run_dir, 1), alone, dump(sampler) if dry_run else None
    )


@commands.command()
@RUN
def status(run: Path) -> None:
    """What the job of RUN is doing, as far as its files and the scheduler tell.  Of a sweep or an
    encoding, a line for each job.
    """
    from launch.status import status_report

    click.echo(status_report(run))


@commands.command()
@RUN
@click.option("-f", "--follow", is_flag=True, help="Go on as lines arrive, until the job is over.")
def logs(run: Path, follow: bool) -> None:
    """The lines of all ranks, each with its rank, in the order in which they are found."""
    from launch.logs import merged

    for line in merged(run, follow=follow):
        click.echo(line)


@commands.command()
@RUN
def cancel(run: Path) -> None:
    """End the job of RUN after a checkpoint, for good; `resume` takes it up again.  Of a sweep or
    an encoding, all its jobs.
    """
    from launch.status import cancel as cancel_jobs

    click.echo(cancel_jobs(run))


@commands.command()
@RUN
def resume(run: Path) -> None:
    """Submit the newest job of RUN again, as it was, and what watches for its checkpoints.  Of a
    sweep, of all that ended early.
    """
    from launch.folder import find_job_folders
    from launch.status import job_states, unfinished_runs

    folder, found = run, find_job_folders(run)
    if found[0].read_raw_record().get("kind") == "encode":
        raise ConfigError(
            f"{folder}: holds latents: launch their `encode` again; what was finished is left alone"
        )
    if len(found) == 1:
        resubmit(found[0])
    elif found := unfinished_runs(found):
        resubmit_array(found)
    else:
        raise ConfigError(f"{folder}: all its runs are complete, or with the scheduler")
    watching = [
        JobFolder(path.parent)
        for each in found
        for path in sorted(each.path.glob("watch/*/job.json"))
    ]
    for watch, state in zip(watching, job_states(watching), strict=True):
        if not state:
            resubmit(watch)


def main() -> None:
    """What the console script `lpl-launch` calls."""
    run(commands)


if __name__ == "__main__":
    main()
