"""`lpl-pretrain export RUN`: whole weights as one safetensors file, or a folder for diffusers; one
process, no engine.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from lpl_pretrain.config.best import load_best
from lpl_pretrain.config.check import run_identity
from lpl_pretrain.config.load import load_run_config
from lpl_pretrain.config.paths import expand
from lpl_pretrain.config.records import FORMAT_VERSION, read_record
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import ConfigError, DataError
from lpl_pretrain.runtime.atomic import atomic_write
from lpl_pretrain.runtime.log import log
from lpl_pretrain.runtime.preempt import needs_cleanup

POSTHOC = "posthoc_"
WEIGHTS = re.compile(r"ema|raw|ema_power_0\.[0-9]{3}|posthoc_0?\.[0-9]+")


def run(
    run: str,
    *,
    weights: str,
    step: int | None,
    best: str | None,
    sigma_rel: float | None,
    format: str,
    output: str,
) -> None:
    run_dir = RunDir(expand(run))
    config, target = load_run_config(run_dir), expand(output)
    if best is not None:
        if step is not None or sigma_rel is not None:
            raise ConfigError(
                f"--best={best} with --step or --sigma-rel: it names both; leave the others out"
            )
        step, weights = best_of(run_dir, best)
    sigma_rel = length_of(weights, sigma_rel)
    check_output(target, folder=format == "diffusers")
    from lpl_pretrain.checkpoint.weights import read_weights, reconstruct_ema

    if sigma_rel is None:
        tensors, facts = read_weights(run_dir, weights, step, run_identity(config))
    else:
        tensors, facts = reconstruct_ema(
            run_dir, config.ema.sigma_rel, sigma_rel, step, run_identity(config)
        )
    parameters = sum(tensor.numel() for tensor in tensors.values())
    try:
        if format == "diffusers":
            write_folder(target, run_dir, config, tensors, facts)
        else:
            write_file(target, config, tensors, facts)
    except OSError as error:
        raise ConfigError(
            f"--output={output}: cannot be written: {error.strerror or error}"
        ) from None
    print(f"{output}: {parameters:,} parameters; {facts}")


def length_of(weights: str, sigma_rel: float | None) -> float | None:
    """sigma_rel of the power-function average to reconstruct from snapshots; None if a checkpoint
    holds `weights`.  Raises ConfigError.
    """
    if not WEIGHTS.fullmatch(weights):
        raise ConfigError(f"--weights={weights}: wanted ema, raw, ema_power_0.050 or posthoc_0.080")
    return float(weights.removeprefix(POSTHOC)) if weights.startswith(POSTHOC) else sigma_rel


def check_output(output: Path, *, folder: bool) -> None:
    """Raises ConfigError for what cannot be written, before the weights are read."""
    if folder and output.exists():
        raise ConfigError(f"--output={output}: is there already; remove it, or name another folder")
    if not folder and output.is_dir():
        raise ConfigError(f"--output={output}: is a folder, wanted a file to write")


def best_of(run_dir: RunDir, protocol: str) -> tuple[int, str]:
    """Step and weights.  Raises ConfigError or DataError."""
    path = run_dir.best(protocol)
    if not path.is_file():
        raise ConfigError(
            f"--best={protocol}: {path} is not there: evaluate with a protocol of this name that "
            "sets `best`"
        )
    found = load_best(path, log.warning)
    if found is None:
        raise DataError(
            f"--best={protocol}: {path} is damaged (see the warning above): evaluate again, or "
            "name --step"
        )
    return found["step"], found["weights"]


def write_file(
    output: Path, config: TrainConfig, tensors: dict[str, Any], facts: dict[str, str]
) -> None:
    from lpl_pretrain.runtime.tensors import safetensors_blocks

    with atomic_write(output) as temporary, temporary.open("wb") as file:
        file.writelines(safetensors_blocks(tensors, {"run": config.name, **facts}))


def write_folder(
    output: Path,
    run_dir: RunDir,
    config: TrainConfig,
    tensors: dict[str, Any],
    facts: dict[str, str],
) -> None:
    """Whole or not at all."""
    from lpl_pretrain.config.data_mixture import read_data
    from lpl_pretrain.models.export_diffusers import write_pipeline

    temporary = output.with_name(f".{output.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    needs_cleanup()
    temporary.mkdir(parents=True)
    try:
        write_pipeline(
            temporary,
            config,
            read_data(config.data.folder).merged,
            tensors,
            {**facts, **scores(run_dir)},
        )
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def scores(run_dir: RunDir) -> dict[str, str]:
    """Scores of the newest scored step, by protocol, for the model card."""
    found = {}
    for path in sorted(run_dir.path.glob("evaluations/step_*/*.json")):
        try:
            record = read_record(path)
        except DataError as error:
            log.warning("%s: this score is left out", error)
            continue
        if record["format_version"] == FORMAT_VERSION:
            values = ", ".join(
                f"{r['metric']} {r['value']:.4g} (w = {r['guidance_scale']:g})"
                for r in record["results"]
            )
            found[f"score by {path.stem}"] = f"{values}, step {record['step']}"
    return found
