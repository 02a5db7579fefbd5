"""Opens checkpoints: everything is checked before anything is used.

All code that reads a checkpoint opens it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl_pretrain.checkpoint.manifest import Manifest, rank_file
from lpl_pretrain.checkpoint.state import check_state, read_state
from lpl_pretrain.checkpoint.store import Reader
from lpl_pretrain.config.hashing import file_sha256
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import CheckpointError, DamagedCheckpointError
from lpl_pretrain.runtime.log import log


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint that has passed all checks."""

    folder: Path
    manifest: Manifest
    reader: Reader
    state: dict[str, Any]


def open_checkpoint(
    folder: Path,
    *,
    identity: str | None = None,
    samples_per_step: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Checkpoint:
    """Checks the sizes of all files, the small files, and the hashes of this rank's part of the
    files.  Not collective.

    `identity`: hash of the configuration that it must have been saved with (config/check.py).
    `samples_per_step`: global batch size of a run that resumes from it.  Raises
    DamagedCheckpointError, and CheckpointError for a checkpoint of another run or another version.
    """
    manifest = Manifest.read(folder)
    if identity is not None and manifest.identity != identity:
        raise CheckpointError(
            f"{folder}: was saved by a run with another configuration ({manifest.identity[:12]}, "
            f"this one is {identity[:12]}): it belongs in the directory of that run"
        )
    if samples_per_step is not None and manifest.samples_seen != manifest.step * samples_per_step:
        raise DamagedCheckpointError(
            f"{folder}: samples_seen={manifest.samples_seen} after {manifest.step} steps of "
            f"{samples_per_step} samples"
        )
    manifest.check_sizes(folder)
    names = sorted(manifest.files)[rank::world_size]
    for name in names:
        _check_hash(folder / name, manifest.files[name].sha256)
    reader = Reader(folder, manifest)
    state = read_state(folder)
    check_state(folder, state, manifest, complete=samples_per_step is not None)
    for saved_rank in range(manifest.world_size):
        if rank_file(saved_rank) in names:
            reader.index.check_header(saved_rank)
    return Checkpoint(folder, manifest, reader, state)


def _check_hash(path: Path, expected: str) -> None:
    """Raises DamagedCheckpointError unless the file has this sha256."""
    try:
        actual = file_sha256(path)
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: {error.strerror or error}") from None
    if actual != expected:
        raise DamagedCheckpointError(f"{path}: its sha256 is not the manifest's")


def find_corruption(folder: Path) -> str | None:
    """Describes the damage of a checkpoint, if any.  Raises CheckpointError for another format."""
    try:
        open_checkpoint(folder)
    except DamagedCheckpointError as error:
        return str(error)
    return None


def has_expected_sizes(folder: Path) -> bool:
    """Whether the manifest is valid and all files have its sizes; their content is not read."""
    try:
        Manifest.read(folder).check_sizes(folder)
    except CheckpointError:
        return False
    return True


def open_step(run_dir: RunDir, step: int | None, identity: str | None = None) -> Checkpoint:
    """Opens the checkpoint of `step`, or else the newest undamaged one of a run; damaged ones are
    skipped with a warning.

    Raises CheckpointError if `step` is missing or damaged, or if all checkpoints are damaged.
    """
    if step is not None:
        try:
            return open_checkpoint(
                run_dir.checkpoint(run_dir.complete_step(step)), identity=identity
            )
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(
                f"{error}: bring it back, or name another --step"
            ) from None
    run_dir.complete_step(None)
    steps = run_dir.complete_checkpoints()
    damage = ""
    for candidate in reversed(steps):
        folder = run_dir.checkpoint(candidate)
        try:
            return open_checkpoint(folder, identity=identity)
        except DamagedCheckpointError as error:
            damage = str(error)
            warn_damaged(folder, damage)
    raise all_damaged_error(run_dir, len(steps), damage)


def warn_damaged(folder: Path, damage: str) -> None:
    """Logs that a damaged checkpoint is skipped."""
    log.warning("DAMAGED CHECKPOINT %s: passed over for an older one. %s", folder.name, damage)


def all_damaged_error(run_dir: RunDir, num_checkpoints: int, damage: str) -> CheckpointError:
    """Error for a run without an undamaged checkpoint.

    `damage` of the oldest is part of the message: an I/O error in it makes the error transient, so
    that a scheduler tries again.
    """
    return CheckpointError(
        f"{run_dir.checkpoints}: all {num_checkpoints} checkpoints are damaged ({damage}; see the "
        "warnings above): bring one back, or remove them to start again"
    )
