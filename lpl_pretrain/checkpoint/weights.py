"""Full weights of a run: parameters, EMA, and post-hoc EMA of any length, reconstructed from
snapshots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.checkpoint.store import Reader
from lpl_pretrain.checkpoint.verify import open_checkpoint, open_step, warn_damaged
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import power_kind
from lpl_pretrain.ema.profiles import reconstruction
from lpl_pretrain.errors import CheckpointError, ConfigError, DamagedCheckpointError

POSTHOC = "posthoc_"
"""Prefix of the names of reconstructed weights."""
Weights = tuple[dict[str, Tensor], dict[str, str]]
"""(tensors by parameter name, metadata that describes them)"""


def read_weights(
    run_dir: RunDir, weights: str, step: int | None, identity: str | None = None
) -> Weights:
    """Reads weights that a checkpoint stores: `ema`, `raw`, `ema_power_...`.

    Without `step` the newest undamaged checkpoint is read.  `identity`: see `open_checkpoint`.
    Raises CheckpointError.
    """
    checkpoint = open_step(run_dir, step, identity)
    tensors = dict(checkpoint.reader.iter_full("param" if weights == "raw" else weights))
    return tensors, {"weights": weights, "step": str(checkpoint.manifest.step)}


def reconstruct_ema(
    run_dir: RunDir,
    stored_sigma_rels: tuple[float, ...],
    sigma_rel: float,
    step: int | None,
    identity: str | None = None,
) -> Weights:
    """Reconstructs a power-function EMA of any relative length `sigma_rel` from all snapshots up to
    `step` (arXiv 2312.02696, section 3.2).

    `stored_sigma_rels`: lengths of the averages that the snapshots hold.  Without `step` the EMA
    ends at the newest undamaged snapshot.  An earlier damaged one is refused: without it the result
    would be another average.  Raises ConfigError and CheckpointError.
    """
    if not 0.01 < sigma_rel < 0.28:
        raise ConfigError(f"sigma_rel={sigma_rel}: wanted 0.01 to 0.28")
    steps = [saved for saved in run_dir.complete_snapshots() if step is None or saved <= step]
    if not steps or not stored_sigma_rels or (step is not None and steps[-1] != step):
        have = ", ".join(map(str, run_dir.complete_snapshots())) or "none"
        raise CheckpointError(
            f"{run_dir.path}: no snapshot of step {step or 'any'}, there are: {have}; set "
            "ema.sigma_rel and ema.snapshot_every_steps"
        )
    readers = _open_snapshots(run_dir, steps, identity, newest_may_be_damaged=step is None)
    steps = list(readers)
    stored = [
        (saved, stored_sigma_rel) for saved in steps for stored_sigma_rel in stored_sigma_rels
    ]
    coefficients = reconstruction(stored, (steps[-1], sigma_rel)).tolist()
    tensors = {}
    for name in readers[steps[-1]].entries_of(power_kind(stored_sigma_rels[0])):
        total = torch.zeros((), dtype=torch.float64)
        for (saved, stored_sigma_rel), coefficient in zip(stored, coefficients, strict=True):
            average = readers[saved].read_full(power_kind(stored_sigma_rel), name)
            total = total + coefficient * average.double()
        tensors[name] = total.to(torch.float32)
    return tensors, {
        "weights": power_kind(sigma_rel),
        "step": str(steps[-1]),
        "snapshots": str(len(steps)),
    }


def _open_snapshots(
    run_dir: RunDir, steps: list[int], identity: str | None, *, newest_may_be_damaged: bool
) -> dict[int, Reader]:
    """Opens the snapshots of `steps`: readers by step, ascending.  Raises CheckpointError."""
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
            warn_damaged(folder, str(error))
            continue
        if step == 0:
            raise CheckpointError(f"{folder}: an average needs at least one step")
        readers[step] = checkpoint.reader
    if not readers:
        raise CheckpointError(
            f"{run_dir.path}: all {len(steps)} snapshots are damaged (see the warnings above)"
        )
    return dict(sorted(readers.items()))
