"""The one way in which a checkpoint is opened, wherever it is read: everything is checked before
anything is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl_pretrain.checkpoint.manifest import Manifest, pieces_file
from lpl_pretrain.checkpoint.state import check_state, read_state
from lpl_pretrain.checkpoint.store import Reader
from lpl_pretrain.config.hashing import file_sha256
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import CheckpointError, DamagedCheckpointError
from lpl_pretrain.runtime.log import log


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint."""

    folder: Path
    manifest: Manifest
    reader: Reader
    state: dict[str, Any]


def open_checkpoint(
    folder: Path,
    *,
    identity: str | None = None,
    samples_per_step: int | None = None,
    share: int = 0,
    shares: int = 1,
) -> Checkpoint:
    """Not collective.  Compares all sizes and small files, and the content of every `shares`-th
    file from `share` on.

    `identity` of the run that it should belong to (config/check.py); `samples_per_step` of a run
    that wants to go on from it. Raises DamagedCheckpointError, and CheckpointError for another
    run's or another version's checkpoint.
    """
    manifest = Manifest.read(folder)
    if identity is not None and manifest.identity != identity:
        raise CheckpointError(
            f"{folder}: was saved by a run with another configuration ({manifest.identity[:12]}, "
            f"this one is {identity[:12]}): "
            "it belongs in the directory of that run"
        )
    if samples_per_step is not None and manifest.samples_seen != manifest.step * samples_per_step:
        raise DamagedCheckpointError(
            f"{folder}: samples_seen={manifest.samples_seen} after {manifest.step} steps of "
            f"{samples_per_step} samples"
        )
    manifest.check_sizes(folder)
    names = sorted(manifest.files)[share::shares]
    for name in names:
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            raise DamagedCheckpointError(f"{folder / name}: {error.strerror or error}") from None
        if found != manifest.files[name].sha256:
            raise DamagedCheckpointError(f"{folder / name}: its sha256 is not the manifest's")
    reader, state = Reader(folder, manifest), read_state(folder)
    check_state(folder, state, manifest, whole=samples_per_step is not None)
    for rank in range(manifest.world_size):
        if pieces_file(rank) in names:
            reader.index.check_header(rank)
    return Checkpoint(folder, manifest, reader, state)


def damage(folder: Path, *, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, if anything.  Raises CheckpointError for another version's."""
    try:
        open_checkpoint(folder, share=share, shares=shares)
    except DamagedCheckpointError as error:
        return str(error)
    return None


def looks_sound(folder: Path) -> bool:
    """Whether the manifest is whole and all files have their sizes; their content is not read."""
    try:
        Manifest.read(folder).check_sizes(folder)
    except CheckpointError:
        return False
    return True


def open_step(run_dir: RunDir, step: int | None, identity: str | None = None) -> Checkpoint:
    """`step`, or else the newest sound checkpoint of a run: damaged ones are passed over with a
    warning.

    Raises CheckpointError when `step` is missing or damaged, or when none is sound.
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
    steps, problem = run_dir.complete_checkpoints(), ""
    for found in reversed(steps):
        try:
            return open_checkpoint(run_dir.checkpoint(found), identity=identity)
        except DamagedCheckpointError as error:
            problem = str(error)
            warn_passed_over(run_dir.checkpoint(found), problem)
    raise all_damaged(run_dir, len(steps), problem)


def warn_passed_over(folder: Path, problem: str) -> None:
    log.warning("DAMAGED CHECKPOINT %s: passed over for an older one. %s", folder.name, problem)


def all_damaged(run_dir: RunDir, count: int, problem: str) -> CheckpointError:
    """`problem`: what is wrong with the oldest; an I/O error in it lets a scheduler try again."""
    return CheckpointError(
        f"{run_dir.checkpoints}: all {count} checkpoints are damaged ({problem}; see the "
        "warnings above): "
        "bring one back, or remove them to start again"
    )
