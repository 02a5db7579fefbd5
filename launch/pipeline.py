"""`launch pipeline`: encode, verify, train and evaluate as jobs that depend on one another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from launch.evaluation_jobs import EvaluationLauncher
from launch.job import JobSpec
from launch.script_checks import check_folder, resolve_path
from launch.submit import submit_or_preview, submit_or_preview_encoding
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.config.load import dump, load_config
from lpl_pretrain.config.override import as_override
from lpl_pretrain.config.schema import TrainConfig

if TYPE_CHECKING:
    from launch.options import Target


def submit_pipeline(
    encoding: str, training: str, protocol: str | None, overrides: tuple[str, ...], target: Target
) -> None:
    """Submit all parts.  `overrides` change the training, whose data are the encoded latents.

    Raises ConfigError, before anything is submitted, for a part that could not run.
    """
    profile = target.profile
    dry_run = target.dry_run
    source = load_config(EncodeConfig, encoding, ())
    latents = resolve_path(source.output, "output")
    encode_config = dump(source.model_copy(update={"output": str(latents)}))
    train_overrides = [*overrides, as_override("data.folder", str(latents))]
    settings = load_config(TrainConfig, training, train_overrides)
    run_dir = resolve_path(settings.run_dir or f"runs/{settings.name}", "run_dir")
    settings = settings.model_copy(update={"run_dir": str(run_dir)})
    evaluations = None
    if protocol is not None:
        evaluations = EvaluationLauncher(protocol, (), target.cluster, target.changes)
    for folder in (latents, run_dir):
        check_folder(folder)

    argv = ["encode", str(Path(encoding).resolve()), as_override("output", str(latents))]
    encoded = submit_or_preview_encoding(
        argv, latents, target.nodes, profile, encode_config, dry_run=dry_run
    )
    verify = JobSpec(
        "encode",
        [*argv, "--verify"],
        latents,
        1,
        f"afterok:{encoded}",
        "verify",
        config=encode_config,
    )
    verified = submit_or_preview(verify, profile.of_one_process(), dry_run=dry_run)
    train = JobSpec(
        "train",
        [
            "train",
            str(Path(training).resolve()),
            *train_overrides,
            as_override("run_dir", str(run_dir)),
        ],
        run_dir,
        target.nodes,
        f"afterok:{verified}",
        config=dump(settings),
    )
    submit_or_preview(train, profile, dry_run=dry_run)
    if evaluations is not None:
        dependency = f"afterok:{verified}"
        evaluations.submit_watcher(run_dir, dependency=dependency, dry_run=dry_run)
