"""`python -m launch`: submit, watch, follow, cancel and go on.  Parse, check what can be checked here, call one function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from launch.profile import ClusterProfile
from lpl_pretrain.cli.main import run
from lpl_pretrain.config.load import dump, load_config
from lpl_pretrain.errors import ConfigError


def on_cluster(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that submits a job."""
    options = [
        click.option("--cluster", required=True, metavar="PROFILE", help="configs/cluster/*.yaml"),
        click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True),
        click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a key of the profile."),
        click.option("--dry-run", is_flag=True, help="Print the script and the resolved configuration, and submit nothing."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def commands() -> None:
    """Start the commands of lpl-pretrain on a SLURM cluster.

    \b
    python -m launch train    configs/train/dit_xl2_in256.yaml --cluster configs/cluster/slurm.yaml --nodes 4
    python -m launch status   runs/dit_xl2_in256
    python -m launch logs     runs/dit_xl2_in256 -f
    python -m launch evaluate runs/dit_xl2_in256 configs/evaluate/in256_50k.yaml --watch --cluster configs/cluster/slurm.yaml
    """


@commands.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
@on_cluster
@click.option("--evaluate-with", metavar="PROTOCOL", help="Also submit a job that scores checkpoints until training has ended.")
@click.option("--evaluate-cluster", metavar="PROFILE", help="Where that one runs, on one node; as --cluster when absent.")
def train(
    config: str,
    overrides: tuple[str, ...],
    cluster: str,
    nodes: int,
    changes: tuple[str, ...],
    dry_run: bool,
    evaluate_with: str | None,
    evaluate_cluster: str | None,
) -> None:
    """Train CONFIG; a run that was begun goes on."""
    from lpl_pretrain.config.mix import read_data
    from lpl_pretrain.config.rundir import RunDir
    from lpl_pretrain.config.schema import TrainConfig
    from lpl_pretrain.config.start import check_start

    profile, settings = load_config(ClusterProfile, cluster, changes), load_config(TrainConfig, config, overrides)
    run_dir = Path(settings.run_dir or f"runs/{settings.name}").resolve()
    check_start(settings, RunDir(run_dir), read_data(settings.data.folder).merged, nodes * profile.processes_per_node)
    argv = ["train", str(Path(config).resolve()), *overrides, f"run_dir={run_dir}"]
    scorer = None
    if evaluate_with is not None:
        from lpl_pretrain.config.evaluation import check_protocol, check_sampler
        from lpl_pretrain.config.protocol import EvaluateConfig

        protocol = load_config(EvaluateConfig, evaluate_with, [])
        check_protocol(protocol)
        check_sampler(settings.diffusion.prediction, protocol.sampler)
        scorer = load_config(ClusterProfile, evaluate_cluster or cluster, () if evaluate_cluster else changes)
    place("train", argv, run_dir, nodes, profile, dump(settings) if dry_run else None)
    if scorer is not None:
        watch = ["evaluate", str(run_dir), str(Path(str(evaluate_with)).resolve()), "--watch"]
        place("evaluate", watch, run_dir, 1, scorer, dump(protocol) if dry_run else None)


@commands.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
@on_cluster
def encode(config: str, overrides: tuple[str, ...], cluster: str, nodes: int, changes: tuple[str, ...], dry_run: bool) -> None:
    """Encode CONFIG; what was finished is left alone."""
    from lpl_pretrain.config.encode import EncodeConfig

    profile, settings = load_config(ClusterProfile, cluster, changes), load_config(EncodeConfig, config, overrides)
    argv = ["encode", str(Path(config).resolve()), *overrides]
    place("encode", argv, Path(settings.output).resolve(), nodes, profile, dump(settings) if dry_run else None)


@commands.command()
@click.argument("run")
@click.argument("protocol")
@click.argument("overrides", nargs=-1)
@click.option("--watch", is_flag=True, help="Go on until training has ended and everything is scored.")
@on_cluster
def evaluate(
    run: str,
    protocol: str,
    overrides: tuple[str, ...],
    watch: bool,
    cluster: str,
    nodes: int,
    changes: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Score the checkpoints of RUN as PROTOCOL says."""
    from lpl_pretrain.config.evaluation import check_protocol
    from lpl_pretrain.config.protocol import EvaluateConfig

    profile, settings = load_config(ClusterProfile, cluster, changes), load_config(EvaluateConfig, protocol, overrides)
    check_protocol(settings)
    run_dir = Path(run).resolve()
    argv = ["evaluate", str(run_dir), str(Path(protocol).resolve()), *overrides, *(["--watch"] if watch else [])]
    place("evaluate", argv, run_dir, nodes, profile, dump(settings) if dry_run else None)


@commands.command()
@click.option("--encode", "encoding", required=True, metavar="CONFIG", help="configs/encode/*.yaml")
@click.option("--train", "training", required=True, metavar="CONFIG", help="configs/train/*.yaml; its data are what was encoded.")
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
    """Encode, verify, train and score, each after the one before has ended well; OVERRIDES are of the training."""
    from lpl_pretrain.config.encode import EncodeConfig
    from lpl_pretrain.config.evaluation import check_protocol
    from lpl_pretrain.config.protocol import EvaluateConfig
    from lpl_pretrain.config.schema import TrainConfig

    profile, source = load_config(ClusterProfile, cluster, changes), load_config(EncodeConfig, encoding, ())
    latents = Path(source.output).resolve()
    given = [*overrides, f"data.folder={latents}"]
    settings = load_config(TrainConfig, training, given)
    run_dir, alone = Path(settings.run_dir or f"runs/{settings.name}").resolve(), profile.model_copy(update=ONE_PROCESS)
    shown = dump(settings) if dry_run else None
    first = place("encode", ["encode", str(Path(encoding).resolve()), f"output={latents}"], latents, nodes, profile, shown)
    check = ["encode", str(Path(encoding).resolve()), f"output={latents}", "--verify"]
    checked = place("encode", check, latents, 1, alone, shown, after=f"afterok:{first}", part="verify")
    train = ["train", str(Path(training).resolve()), *given, f"run_dir={run_dir}"]
    place("train", train, run_dir, nodes, profile, shown, after=f"afterok:{checked}")
    if protocol is not None:
        check_protocol(load_config(EvaluateConfig, protocol, ()))
        watch = ["evaluate", str(run_dir), str(Path(protocol).resolve()), "--watch"]
        place("evaluate", watch, run_dir, 1, profile, shown, after=f"afterok:{checked}")


@commands.command()
@click.argument("run")
def status(run: str) -> None:
    """What the job of RUN is doing, as far as its files and the scheduler tell."""
    from launch.status import report

    click.echo(report(Path(run).resolve()))


@commands.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on as lines arrive, until the job is over.")
def logs(run: str, follow: bool) -> None:
    """The lines of all ranks, each with its rank, in the order in which they are found."""
    from launch.logs import merged

    for line in merged(Path(run).resolve(), follow=follow):
        click.echo(line)


@commands.command()
@click.argument("run")
def cancel(run: str) -> None:
    """End the job of RUN after a checkpoint, for good; `resume` takes it up again."""
    from launch.status import cancel_job

    click.echo(cancel_job(Path(run).resolve()))


@commands.command()
@click.argument("run")
def resume(run: str) -> None:
    """Submit the newest job of RUN again, as it was."""
    from launch.folder import JobFolder

    folder = JobFolder(Path(run).resolve() / "launch")
    if not folder.facts.is_file():
        raise ConfigError(f"{folder.facts}: not there: nothing was launched for this run; use `launch train`")
    facts = folder.read_facts()
    place(
        facts["kind"], facts["argv"], Path(facts["run_dir"]), facts["nodes"], ClusterProfile.model_validate(facts["profile"]), None
    )


ONE_PROCESS = {"processes_per_node": 1, "gpus_per_node": 0}


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
    """Submits and gives the job's id, or shows what would be submitted."""
    from launch.submit import Order, script, submit

    order = Order(kind, argv, run_dir, nodes, after, part)
    if shown is not None:
        click.echo(
            f"{script(order, profile)}\n\n# The command of every process\n# lpl-pretrain {argv}\n\n# Its configuration\n{shown}"
        )
        return "ID"
    job = submit(order, profile)
    click.echo(
        f"job {job}, {part or kind}: {nodes} nodes x {profile.processes_per_node} processes; python -m launch status {run_dir}"
    )
    return job


if __name__ == "__main__":
    run(commands)
