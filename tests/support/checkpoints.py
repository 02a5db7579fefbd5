"""Small checkpoints written without a model, and edits of them that keep all digests valid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpl_pretrain.checkpoint.manifest import DIGEST, STATE, Manifest, digest_of, write_json
from lpl_pretrain.checkpoint.store import merge_parts, write_rank
from lpl_pretrain.checkpoint.verify import Checkpoint, open_checkpoint
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.parallel.strategy import ParamRange

SHAPES = {"a.weight": (4, 3), "b": (5,)}
KINDS = ("param", "ema", "optimizer.exp_avg")
SAMPLES_PER_STEP = 8
IDENTITY = "1" * 64


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for kind in KINDS
    }


def state_of(step: int) -> dict[str, Any]:
    samples_seen = step * SAMPLES_PER_STEP
    return {
        "step": step,
        "stream": {"samples_seen": samples_seen, "epoch": 0, "seed": 0, "fingerprint": "f" * 64},
        "loss_terms": {"lpl": {"frozen": 0.5, "diffusion_sum": 1.0, "perceptual_sum": 2.0}},
        "loss_scale": {"value": 1.0, "dynamic": False, "good_updates": 0},
        "skipped_updates": 0,
    }


def save(
    run_dir: RunDir, step: int, *, ranks: int = 2, snapshot: bool = False, format: int = 3
) -> Path:
    """Write a checkpoint of `ranks` ranks that split each parameter at uneven elements."""
    folder = run_dir.snapshot(step) if snapshot else run_dir.checkpoint(step)
    folder.mkdir(parents=True)
    content = tensors_of(step)
    if snapshot:
        content = {"ema_power_0.050": content["ema"]}
    for rank in range(ranks):
        entries = []
        for kind, named in content.items():
            for name, tensor in named.items():
                flat = tensor.flatten()
                start, stop = (len(flat) * r // ranks for r in (rank, rank + 1))
                entries.append((kind, ParamRange(name, SHAPES[name], start, flat[start:stop])))
        write_rank(folder, rank, entries)
    files = merge_parts(folder, ranks)
    files[STATE] = write_json(folder / STATE, state_of(step))
    Manifest(step, step * SAMPLES_PER_STEP, step - 1, "Test", ranks, IDENTITY, files).write(folder)
    if format == 2:
        content = json.loads((folder / "manifest.json").read_text())
        del content[DIGEST]
        (folder / "manifest.json").write_text(json.dumps({**content, "format": 2}))
    return folder


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of a checkpoint in place and recompute every digest that covers it."""
    path = folder / name
    content = json.loads(path.read_text())
    content = change(content) or content
    if name != "manifest.json":
        path.write_text(json.dumps(content))
        rewrite_manifest(folder)
        return
    if isinstance(content, dict):
        content.pop(DIGEST, None)
        content[DIGEST] = digest_of(content)
    path.write_text(json.dumps(content))


def rewrite_manifest(folder: Path) -> None:
    """Recompute sizes and digests in the manifest from the files on disk."""

    def change(content: dict[str, Any]) -> None:
        for name in content["files"]:
            data = (folder / name).read_bytes()
            content["files"][name] = {
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }

    edit(folder, "manifest.json", change)


def shift_range(folder: Path) -> None:
    """Edit index.json so that the ranges of a.weight do not start at its first element."""

    def change(index: dict[str, Any]) -> None:
        for named in index.values():
            named["a.weight"]["ranges"][0][:2] = [1, 7]

    edit(folder, "index.json", change)


def open_with_defaults(folder: Path) -> Checkpoint:
    return open_checkpoint(folder, identity=IDENTITY, samples_per_step=SAMPLES_PER_STEP)


def content_of(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    return {kind: dict(checkpoint.reader.iter_full(kind)) for kind in checkpoint.reader.entries}
