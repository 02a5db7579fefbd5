"""Whole weights of a run by name: averages, parameters, and averages of any length rebuilt from its
snapshots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.checkpoint.store import Reader
from lpl_pretrain.checkpoint.verify import open_checkpoint, open_step, warn_passed_over
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import power_kind
from lpl_pretrain.ema.profiles import reconstruction
from lpl_pretrain.errors import CheckpointError, ConfigError, DamagedCheckpointError

POSTHOC = "posthoc_"
Weights = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors by name, and what they are."""


def stored(run_dir: RunDir, weights: str, step: int | None, identity: str | None = None) -> Weights:
    """Weights as they lie in a checkpoint: `ema`, `raw`, `ema_power_...`.

    Without `step` the newest sound checkpoint is read.  `identity`: as `open_checkpoint` has it.
    Raises CheckpointError.
    """
    checkpoint = open_step(run_dir, step, identity)
    tensors = dict(checkpoint.reader.full("param" if weights == "raw" else weights))
    return tensors, {"weights": weights, "step": str(checkpoint.manifest.step)}


def reconstructed(
    run_dir: RunDir,
    lengths: tuple[float, ...],
    sigma_rel: float,
    step: int | None,
    identity: str | None = None,
) -> Weights:
    """A power-function average of any length, from all snapshots up to `step` (arXiv 2312.02696,
    section 3.2).

    Without `step` it ends at the newest sound snapshot; a damaged one before that is refused, for
    the others alone would give another average.
    """
    if not 0.01 < sigma_rel < 0.28:
        raise ConfigError(f"sigma_rel={sigma_rel}: wanted 0.01 to 0.28")
    steps = [found for found in run_dir.complete_snapshots() if step is None or found <= step]
    if not steps or not lengths or (step is not None and steps[-1] != step):
        have = ", ".join(map(str, run_dir.complete_snapshots())) or "none"
        raise CheckpointError(
            f"{run_dir.path}: no snapshot of step {step or 'any'}, there are: {have}; set "
            "ema.sigma_rel and ema.snapshot_every_steps"
        )
    readers = _open_snapshots(run_dir, steps, identity, newest_may_be_damaged=step is None)
    steps = list(readers)
    kept = [(found, length) for found in steps for length in lengths]
    coefficients = reconstruction(kept, (steps[-1], sigma_rel))
    tensors = {}
    for name in readers[steps[-1]].named(power_kind(lengths[0])):
        total = torch.zeros((), dtype=torch.float64)
        for (found, length), coefficient in zip(kept, coefficients.tolist(), strict=True):
            total = total + coefficient * readers[found].whole(power_kind(length), name).double()
        tensors[name] = total.to(torch.float32)
    return tensors, {
        "weights": power_kind(sigma_rel),
        "step": str(steps[-1]),
        "snapshots": str(len(steps)),
    }


def _open_snapshots(
    run_dir: RunDir, steps: list[int], identity: str | None, *, newest_may_be_damaged: bool
) -> dict[int, Reader]:
    """Readers of sound snapshots by step, ascending.  Raises CheckpointError."""
    readers: dict[int, Reader] = {}
    for step in reversed(steps):
        folder = run_dir.snapshot(step)
        try:
            checkpoint = open_checkpoint(folder, identity=identity)
        except DamagedCheckpointError as error:
            if readers or not newest_may_be_damaged:
                raise DamagedCheckpointError(
                    f"{error}: bring this snapshot back, or name an earlier --step"
                ) from None
            warn_passed_over(folder, str(error))
            continue
        if step == 0:
            raise CheckpointError(f"{folder}: an average needs at least one step")
        readers[step] = checkpoint.reader
    if not readers:
        raise CheckpointError(
            f"{run_dir.path}: all {len(steps)} snapshots are damaged (see the warnings above)"
        )
    return dict(sorted(readers.items()))
