"""The folder of a run while a start trains in it: the lease, and what a start records."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lpl_pretrain.config.data_mixture import DataFolders
from lpl_pretrain.config.load import differences, dump, load_run_config
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import CheckpointError, ConfigError, LPLError
from lpl_pretrain.runtime.atomic import atomic_write
from lpl_pretrain.runtime.lease import STALE_S, Lease, describe_holder
from lpl_pretrain.runtime.preempt import Interrupted
from lpl_pretrain.runtime.world import World


@contextmanager
def hold_run(run_dir: RunDir, world: World, missing: Sequence[Path] = ()) -> Iterator[Lease | None]:
    """Collective.  Hold rank 0's lease on the run: two trainings of one run would overwrite each
    other.  Raises CheckpointError.

    The process exits if it loses the lease.  Folders that were `missing` before, and are empty at
    the end, are removed.
    """
    from lpl_pretrain.runtime.dist import first_error

    lease = None
    message = None
    if world.rank == 0:
        on_loss = partial(exit_on_lost_lease, run_dir)
        lease = Lease(run_dir.live, job=world.scheduler_job(), on_loss=on_loss)
    try:
        if lease is not None:
            message = acquire(lease, run_dir)
        if (message := first_error(message)) is not None:
            raise CheckpointError(message)
        yield lease
    finally:
        if lease is not None:
            lease.release()
            with suppress(OSError):
                for folder in missing:
                    folder.rmdir()


def acquire(lease: Lease, run_dir: RunDir) -> str | None:
    """Take the lease; return the error message if another process holds it."""
    try:
        if lease.take():
            return None
    except CheckpointError as error:
        return str(error)
    return (
        f"{run_dir.path}: is being trained by {describe_holder(run_dir.live)}: wait for its end, "
        f"or give this one another run_dir; if that process is gone, the lease {run_dir.live} "
        f"expires in {STALE_S:.0f} s"
    )


def exit_on_lost_lease(run_dir: RunDir) -> NoReturn:
    """Exit at once: other threads of this process may wait for ranks that are gone."""
    from lpl_pretrain.runtime.log import log

    log.error(
        "%s: is being trained by another process now: this one, which was cut off or "
        "suspended, ends",
        run_dir.path,
    )
    os._exit(1)


def clean_finished_run(run_dir: RunDir, world: World) -> None:
    """Remove the lease and half-removed checkpoints of a process that was killed after the last
    checkpoint.
    """
    if run_dir.live.exists() or run_dir.interrupted():
        with suppress(CheckpointError), Lease(run_dir.live, job=world.scheduler_job()) as lease:
            for folder in run_dir.interrupted() if lease.held else []:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def record_start(
    config: TrainConfig, run_dir: RunDir, world: World, data: DataFolders, device: str, *, new: bool
) -> Iterator[Callable[[int], None]]:
    """Collective.  Record a start in the run's folder; yields the function to call before the first
    update.

    A start that is refused before its first update leaves the folder as it was.  `new`: the folder
    did not exist.
    """
    from lpl_pretrain.runtime.dist import all_gather_hostnames
    from lpl_pretrain.trainer import provenance

    hosts = all_gather_hostnames()
    began = False
    config_before = run_dir.config.read_bytes() if run_dir.config.is_file() else None
    changes = changed_keys(config, run_dir)

    def begin(first_step: int) -> None:
        nonlocal began
        began = True
        if world.rank == 0:
            entry = provenance.describe(
                config, data.merged, step=first_step, hosts=hosts, device=device, changes=changes
            )
            provenance.append(run_dir.provenance, entry)

    try:
        if world.rank == 0:
            write(run_dir.config, dump(config).encode())
        yield begin
    except (LPLError, Interrupted):
        if world.rank == 0 and not began:
            discard_start(run_dir, new, config_before)
        raise


def changed_keys(config: TrainConfig, run_dir: RunDir) -> dict[str, Any]:
    """Keys that differ from the previous start; empty if there was none."""
    with suppress(ConfigError):  # one that never made a step, and cannot be read
        return differences(load_run_config(run_dir), config) if run_dir.config.is_file() else {}
    return {}


def discard_start(run_dir: RunDir, new: bool, config_before: bytes | None) -> None:
    """Remove what a refused start wrote, but the lease, which is still held."""
    if new:
        for path in run_dir.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path != run_dir.live:
                path.unlink(missing_ok=True)
    elif config_before is None:
        run_dir.config.unlink(missing_ok=True)
    else:
        write(run_dir.config, config_before)


def write(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
