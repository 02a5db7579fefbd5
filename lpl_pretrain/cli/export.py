"""`lpl-pretrain export RUN`: whole weights as one safetensors file, or a folder for diffusers; one process, no engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lpl_pretrain.config.load import load_run_config
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig, power_kind
from lpl_pretrain.errors import CheckpointError, ConfigError


def run(run: str, *, weights: str, step: int | None, sigma_rel: float | None, format: str, output: str) -> None:
    run_dir = RunDir(Path(run))
    config = load_run_config(run_dir)
    if sigma_rel is None:
        tensors, facts = stored(run_dir, weights, step)
    else:
        tensors, facts = reconstructed(run_dir, config.ema.power, sigma_rel, step)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    if format == "diffusers":
        write_folder(Path(output), run_dir, config, tensors, facts)
    else:
        write_file(Path(output), config, tensors, facts)
    print(f"{output}: {parameters:,} parameters; {facts}")


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
        values = ", ".join(f"{r['metric']} {r['value']:.2f} (w = {r['guidance_scale']:g})" for r in record["results"])
        found[f"score by {path.stem}"] = f"{values}, step {record['step']}"
    return found


def stored(run_dir: RunDir, weights: str, step: int | None) -> tuple[dict[str, Any], dict[str, str]]:
    """As they lie in a checkpoint."""
    from lpl_pretrain.checkpoint.store import read_full

    step = run_dir.complete_step(step)
    _check_sound(run_dir.checkpoint(step))
    return read_full(run_dir.checkpoint(step), "param" if weights == "raw" else weights), {"weights": weights, "step": str(step)}


def reconstructed(
    run_dir: RunDir, lengths: tuple[float, ...], sigma_rel: float, step: int | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """A power-function average of any length, from all snapshots up to `step` (arXiv 2312.02696, section 3.2)."""
    import torch

    from lpl_pretrain.checkpoint.store import Reader
    from lpl_pretrain.ema.profiles import reconstruction

    if not 0.01 < sigma_rel < 0.28:
        raise ConfigError(f"--sigma-rel={sigma_rel}: wanted 0.01 to 0.28")
    steps = [found for found in run_dir.complete_snapshots() if step is None or found <= step]
    if not steps or (step is not None and steps[-1] != step):
        have = ", ".join(map(str, run_dir.complete_snapshots())) or "none"
        raise CheckpointError(
            f"{run_dir.path}: no snapshot of step {step or 'any'}, there are: {have}; set ema.power and ema.snapshot_every_steps"
        )
    kept = [(found, length) for found in steps for length in lengths]
    coefficients = reconstruction(kept, (steps[-1], sigma_rel))
    for found in steps:
        _check_sound(run_dir.snapshot(found))
    readers = {found: Reader(run_dir.snapshot(found)) for found in steps}
    tensors = {}
    for name in readers[steps[-1]].index[power_kind(lengths[0])]:
        total: Any = 0.0
        for (found, length), coefficient in zip(kept, coefficients.tolist(), strict=True):
            total = total + coefficient * readers[found].whole(power_kind(length), name).double()
        tensors[name] = total.to(torch.float32)
    return tensors, {"weights": power_kind(sigma_rel), "step": str(steps[-1]), "snapshots": str(len(steps))}


def _check_sound(folder: Path) -> None:
    from lpl_pretrain.checkpoint.manifest import damage

    if trouble := damage(folder):
        raise CheckpointError(f"{trouble}: bring it back, or name another --step")
