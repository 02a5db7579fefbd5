"""Report of each rank about its node: code, versions, disk, data, device.

Nothing here communicates, and a defect of the node is reported, never raised.
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
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import Precision, TrainConfig
from lpl_pretrain.errors import LPLError
from lpl_pretrain.runtime.lease import Lease
from lpl_pretrain.runtime.source_hash import source_hash
from lpl_pretrain.runtime.world import World

MATRIX_SIZE = 512
"""Rows and columns of the matrices whose product is checked."""
TAR_HEADER_BYTES = 512
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
OPTIMIZER_COPIES = {"adamw": 2, "muon": 2, "sgd": 0}
"""Copies of the parameters in an optimizer's state, at most."""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """Report of one rank, as plain JSON.  A `..._problem` is None where there is none."""

    rank: int
    host: str
    code: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    refusal: str | None = None
    """Error with which this rank refuses its input."""
    run_dir_problem: str | None = None
    in_use: str | None = None
    """Description of the process that trains the run now; reported by rank 0 only."""
    free_gib: float | None = None
    """Free space on the disk of the run's folder."""
    required_gib: float = 0.0
    """Size of the checkpoints to come."""
    shard: str | None = None
    """Shard that was read; ranks with the same local rank read the same one."""
    shard_problem: str | None = None
    device: str | None = None
    """Name of the GPU; None on a CPU, or where the GPU does not answer."""
    no_device: str | None = None
    """Number of GPUs, where there is none for this rank."""
    device_problem: str | None = None
    memory_gib: float | None = None
    """Free memory of the GPU; None on a CPU."""
    clock_s: float = 0.0
    """Seconds by which this rank's clock is ahead of rank 0's."""
    clock_accuracy_s: float = 0.0


def inspect_node(
    config: TrainConfig,
    run_dir: RunDir,
    world: World,
    data: DataFolders | None,
    refusal: LPLError | None = None,
) -> NodeReport:
    """Check this rank's node.  `data` is None where `refusal` gives the reason."""
    free_gib, run_dir_problem = probe_folder(run_dir)
    in_use = None
    if world.rank == 0 and refusal is None:
        in_use = run_in_use(run_dir, world)
    shard = shard_problem = None
    required_gib = 0.0
    if data is not None:
        shard, shard_problem = probe_shard(data, world.local_rank)
        required_gib = required_checkpoint_gib(config, run_dir, data)
    return NodeReport(
        rank=world.rank,
        host=socket.gethostname(),
        code=source_hash(),
        versions=versions(),
        refusal=None if refusal is None else _format_error(refusal),
        run_dir_problem=run_dir_problem,
        in_use=in_use,
        free_gib=free_gib,
        required_gib=required_gib,
        shard=shard,
        shard_problem=shard_problem,
        **probe_device(world.local_rank),
    )


def versions() -> dict[str, str]:
    """Versions on which a checkpoint's numbers, or the protocol between ranks, depend."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "deepspeed"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def probe_folder(run_dir: RunDir) -> tuple[float | None, str | None]:
    """(free GiB, problem) of the run's folder, or of its nearest parent that exists.

    A temporary file is written and removed.
    """
    path = run_dir.path.absolute()
    existing = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    try:
        free_gib = shutil.disk_usage(existing).free / 2**30
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
    except OSError as error:
        return (0.0, None) if error.errno in DISK_FULL else (None, _format_error(error))
    return free_gib, None


def run_in_use(run_dir: RunDir, world: World) -> str | None:
    """Description of the process that trains the run now; None when there is none."""
    holder = Lease(run_dir.live, job=world.scheduler_job()).other_holder()
    if not holder:
        return None
    return f"it is being trained by process {holder.get('pid')} on {holder.get('host')}"


def probe_shard(data: DataFolders, local_rank: int) -> tuple[str, str | None]:
    """(name, problem) of the shard that ranks with this local rank read, the same on every node."""
    shards = [
        f"{path.rstrip('/')}/{shard.file}"
        for path, index in zip(data.paths, data.indexes, strict=True)
        for shard in index.shards
    ]
    shard = shards[local_rank % len(shards)]
    try:
        with fsspec.open(shard, "rb") as file:
            header = file.read(TAR_HEADER_BYTES)
    except Exception as error:  # drivers of object stores have errors of their own
        return shard, _format_error(error)
    complete = len(header) == TAR_HEADER_BYTES
    return shard, None if complete else f"{shard}: shorter than a header"


def probe_device(local_rank: int) -> dict[str, Any]:
    """Fields of NodeReport about this rank's device: name, free memory, and whether it multiplies
    correctly.
    """
    if not torch.cuda.is_available():
        return {"device_problem": wrong_product(torch.device("cpu"))}
    count = torch.cuda.device_count()
    if local_rank >= count:
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
    except RuntimeError as error:
        return {"device_problem": _format_error(error)}


def wrong_product(device: torch.device) -> str | None:
    """Description of the errors in a product of matrices of small integers, which is exact in every
    floating-point format; None when it is correct.
    """
    integers = torch.arange(MATRIX_SIZE * MATRIX_SIZE).reshape(MATRIX_SIZE, MATRIX_SIZE)
    left = integers % 5
    right = integers % 7
    product = (left.float().to(device) @ right.float().to(device)).cpu()
    wrong = int((product != (left @ right).float()).sum())
    return f"{wrong} wrong numbers in a product of matrices" if wrong else None


def required_checkpoint_gib(config: TrainConfig, run_dir: RunDir, data: DataFolders) -> float:
    """GiB of the checkpoints that are to come and will be kept, and of the one that is written
    before the oldest is removed.
    """
    # imports timm, which takes seconds that a rank with refused input does not spend
    from lpl_pretrain.models.build import build_run_denoiser

    with torch.device("meta"):
        model = build_run_denoiser(config, data.merged)
    # of the parameters: themselves, their average, the optimizer's state, post-hoc EMA snapshots
    copies = 2 + OPTIMIZER_COPIES[config.optimizer.kind] + len(config.ema.sigma_rel)
    bytes_per_number = 8 if config.parallel.precision is Precision.FP64 else 4
    size = copies * sum(p.numel() for p in model.parameters()) * bytes_per_number
    complete = run_dir.complete_checkpoints()
    steps_left = config.steps - (complete[-1] if complete else 0)
    to_come = -(-steps_left // config.checkpoint.every_steps)
    kept = max(1, config.checkpoint.keep_last + 1 - len(complete))
    return size * min(max(to_come, 0), kept) / 2**30


def _format_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
