"""`lpl-pretrain export RUN`: whole weights as one safetensors file, or a folder for diffusers; one process, no engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lpl_pretrain.config.load import load_run_config
from lpl_pretrain.config.paths import expand
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import ConfigError


def run(run: str, *, weights: str, step: int | None, best: str | None, sigma_rel: float | None, format: str, output: str) -> None:
    run_dir = RunDir(expand(run))
    config, target = load_run_config(run_dir), expand(output)
    if best is not None:
        if step is not None or sigma_rel is not None:
            raise ConfigError(f"--best={best} with --step or --sigma-rel: it names both; leave the others out")
        step, weights = best_of(run_dir, best)
    from lpl_pretrain.checkpoint.weights import POSTHOC, reconstructed, stored  # torch: not for --help

    if weights.startswith(POSTHOC):
        sigma_rel = float(weights.removeprefix(POSTHOC))
    if sigma_rel is None:
        tensors, facts = stored(run_dir, weights, step)
    else:
        tensors, facts = reconstructed(run_dir, config.ema.power, sigma_rel, step)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    if format == "diffusers":
        write_folder(target, run_dir, config, tensors, facts)
    else:
        write_file(target, config, tensors, facts)
    print(f"{output}: {parameters:,} parameters; {facts}")


def best_of(run_dir: RunDir, protocol: str) -> tuple[int, str]:
    """Step and weights.  Raises ConfigError."""
    path = run_dir.best(protocol)
    if not path.is_file():
        raise ConfigError(f"--best={protocol}: {path} is not there: evaluate with a protocol of this name that sets `best`")
    found = json.loads(path.read_text())
    return found["step"], found["weights"]


def write_file(output: Path, config: TrainConfig, tensors: dict[str, Any], facts: dict[str, str]) -> None:
    from safetensors.torch import save_file

    from lpl_pretrain.runtime.files import published

    with published(output) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"run": config.name, **facts}
        )


def write_folder(output: Path, run_dir: RunDir, config: TrainConfig, tensors: dict[str, Any], facts: dict[str, str]) -> None:
    """Whole or not at all."""
    from lpl_pretrain.config.mix import read_data
    from lpl_pretrain.models.pipeline_folder import write_pipeline

    if output.exists():
        raise ConfigError(f"--output={output}: is there already; remove it, or name another folder")
    temporary = output.with_name(f".{output.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_pipeline(temporary, config, read_data(config.data.folder).merged, tensors, {**facts, **scores(run_dir)})
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def scores(run_dir: RunDir) -> dict[str, str]:
    """Of the newest scored step, by protocol, for the card."""
    found = {}
    for path in sorted(run_dir.path.glob("evaluations/step_*/*.json")):
        record = json.loads(path.read_text())
        values = ", ".join(f"{r['metric']} {r['value']:.4g} (w = {r['guidance_scale']:g})" for r in record["results"])
        found[f"score by {path.stem}"] = f"{values}, step {record['step']}"
    return found
