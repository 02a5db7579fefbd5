"""What a rank finds out about its node by itself: nothing here communicates, and nothing here
raises for what the node lacks.
"""

from __future__ import annotations

import errno
import platform
import shutil
import socket
import tempfile
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import fsspec
import torch

from lpl_pretrain.config.data_mixture import DataFolders
from lpl_pretrain.config.online_text import text_entries
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import Precision, TrainConfig
from lpl_pretrain.config.text_layout import text_shape
from lpl_pretrain.errors import LPLError
from lpl_pretrain.runtime.lease import Lease
from lpl_pretrain.runtime.source_hash import source_hash
from lpl_pretrain.runtime.world import World

SIDE = 512
"""Of the matrices that are multiplied."""
PROBE_BYTES = 512
"""The first header of a tar."""
FULL = (errno.ENOSPC, errno.EDQUOT)
MOMENTS = {"adamw": 2, "muon": 2, "sgd": 0}


@dataclass(frozen=True, slots=True)
class NodeReport:
    """Plain JSON.  A `..._trouble` is what went wrong, None when nothing did."""

    rank: int
    host: str
    code: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    refusal: str | None = None
    """Why this rank cannot begin, as far as it knows without torch."""
    run_dir_problem: str | None = None
    in_use: str | None = None
    """By whom the run is trained now, as rank 0 finds."""
    free_gib: float | None = None
    """Where the run's folder is."""
    required_gib: float = 0.0
    shard: str | None = None
    """Which one was read: the same by processes of the same number on all nodes."""
    shard_problem: str | None = None
    device: str | None = None
    """Its name; None on a CPU, and where it does not answer."""
    no_device: str | None = None
    device_problem: str | None = None
    memory_gib: float | None = None
    """Free on the device; None on a CPU."""
    clock_s: float = 0.0
    """By how much it is ahead of rank 0's."""
    clock_accuracy_s: float = 0.0


def inspect_node(
    config: TrainConfig,
    run_dir: RunDir,
    world: World,
    data: DataFolders | None,
    refusal: LPLError | None = None,
) -> NodeReport:
    """`data` is None where `refusal` says why."""
    free_gib, run_dir_problem = probe_folder(run_dir)
    in_use = run_in_use(run_dir, world) if world.rank == 0 and refusal is None else None
    shard, shard_problem = (None, None) if data is None else probe_shard(data, world.local_rank)
    return NodeReport(
        rank=world.rank,
        host=socket.gethostname(),
        code=source_hash(),
        versions=versions(),
        refusal=None if refusal is None else _format_error(refusal),
        run_dir_problem=run_dir_problem,
        in_use=in_use,
        free_gib=free_gib,
        required_gib=0.0 if data is None else required_checkpoint_gib(config, run_dir, data),
        shard=shard,
        shard_problem=shard_problem,
        **probe_device(world.local_rank),
    )


def versions() -> dict[str, str]:
    """Of what a checkpoint's numbers, or the ranks' understanding of each other, depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "deepspeed"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def probe_folder(run_dir: RunDir) -> tuple[float | None, str | None]:
    """(free GiB, trouble): a file is written and is gone, where the folder is or will be made."""
    path = run_dir.path.absolute()
    there = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    try:
        free_gib = shutil.disk_usage(there).free / 2**30
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as problem:
        return (0.0, None) if problem.errno in FULL else (None, _format_error(problem))
    return free_gib, None


def run_in_use(run_dir: RunDir, world: World) -> str | None:
    """Words about the process that trains the run now; None when none does."""
    holder = Lease(run_dir.live, job=world.scheduler_job()).other_holder()
    return (
        f"it is being trained by process {holder.get('pid')} on {holder.get('host')}"
        if holder
        else None
    )


def probe_shard(data: DataFolders, local_rank: int) -> tuple[str, str | None]:
    """(name, trouble) of the shard that processes of this number read, on every node the same."""
    folders = zip(data.paths, data.indexes, strict=True)
    shards = [
        f"{path.rstrip('/')}/{shard.file}" for path, index in folders for shard in index.shards
    ]
    shard = shards[local_rank % len(shards)]
    try:
        with fsspec.open(shard, "rb") as file:
            return shard, None if len(
                file.read(PROBE_BYTES)
            ) == PROBE_BYTES else f"{shard}: shorter than a header"
    except Exception as problem:  # drivers of object stores have errors of their own
        return shard, _format_error(problem)


def probe_device(local_rank: int) -> dict[str, Any]:
    """A small product of whole numbers is exact in every format, or the device is broken."""
    if not torch.cuda.is_available():
        return {"device_problem": wrong_product(torch.device("cpu"))}
    if local_rank >= (count := torch.cuda.device_count()):
        return {
            "device": torch.cuda.get_device_name(0),
            "no_device": f"{count} for process {local_rank}, counted from 0",
        }
    device = torch.device("cuda", local_rank)
    try:
        return {
            "device": torch.cuda.get_device_name(device),
            "device_problem": wrong_product(device),
            "memory_gib": torch.cuda.mem_get_info(device)[0] / 2**30,
        }
    except RuntimeError as problem:
        return {"device_problem": _format_error(problem)}


def wrong_product(device: torch.device) -> str | None:
    left, right = (torch.arange(SIDE * SIDE).reshape(SIDE, SIDE) % modulus for modulus in (5, 7))
    product = (left.float().to(device) @ right.float().to(device)).cpu()
    wrong = int((product != (left @ right).float()).sum())
    return f"{wrong} wrong numbers in a product of matrices" if wrong else None


def required_checkpoint_gib(config: TrainConfig, run_dir: RunDir, data: DataFolders) -> float:
    """What the checkpoints that are still to come, and that will be kept, take; one is written
    before another is removed.
    """
    from lpl_pretrain.models.build import (
        build_denoiser,
    )  # imports timm: seconds that a rank need not spend to be refused

    index, complete = data.merged, run_dir.complete_checkpoints()
    text = (
        text_shape(config.conditioning.text_encoders, text_entries(config.conditioning, index.text))
        if config.conditioning.text_encoders
        else None
    )
    with torch.device("meta"):
        model = build_denoiser(config.model, index.latent, len(index.classes), text=text)
    copies = (
        2 + MOMENTS[config.optimizer.kind] + len(config.ema.sigma_rel)
    )  # of parameters: themselves, their average, the rest
    size = (
        copies
        * sum(p.numel() for p in model.parameters())
        * (8 if config.parallel.precision is Precision.FP64 else 4)
    )
    to_come = -(
        -(config.steps - (complete[-1] if complete else 0)) // config.checkpoint.every_steps
    )
    return (
        size * min(max(to_come, 0), max(1, config.checkpoint.keep_last + 1 - len(complete))) / 2**30
    )


def _format_error(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {problem}"
