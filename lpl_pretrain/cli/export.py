"""`lpl-pretrain export RUN`: whole weights as one safetensors file, on one process and without the engine that trained them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lpl_pretrain.config.load import load_run_config
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import power_kind
from lpl_pretrain.errors import CheckpointError, ConfigError


def run(run: str, *, weights: str, step: int | None, sigma_rel: float | None, output: str) -> None:
    from safetensors.torch import save_file

    from lpl_pretrain.runtime.files import published

    run_dir = RunDir(Path(run))
    config = load_run_config(run_dir)
    if sigma_rel is None:
        tensors, facts = stored(run_dir, weights, step)
    else:
        tensors, facts = reconstructed(run_dir, config.ema.power, sigma_rel, step)
    with published(Path(output)) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"run": config.name, **facts}
        )
    print(f"{output}: {sum(tensor.numel() for tensor in tensors.values()):,} parameters; {facts}")


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
