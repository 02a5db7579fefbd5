"""What makes a checkpoint folder complete: manifest.json, written last, with the size and sha256 of every other file.

A folder without a manifest is no checkpoint; one whose files disagree with it is damaged; one of a newer format is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lpl_pretrain.config.rundir import MANIFEST
from lpl_pretrain.errors import CheckpointError

FORMAT = 2
CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    step: int
    samples_seen: int
    optimizer_steps: int
    """Updates applied: `step` less those that were left out."""
    strategy: str
    """Class and world size of the run that saved it: for people, reading needs neither."""
    world_size: int
    identity: str
    """Hash of what the run learns by (config/check.py)."""
    files: dict[str, FileRecord]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """ValueError or OSError if damaged; CheckpointError if this version of lpl_pretrain cannot know what is inside."""
        content = json.loads((folder / MANIFEST).read_text())
        found = content["format"]
        if found != FORMAT:
            remedy = "update lpl_pretrain" if found > FORMAT else "go on with the version that saved it"
            raise CheckpointError(f"{folder}: checkpoint format {found}, this version reads {FORMAT}: {remedy}")
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        return cls(**content, files=files)


def damage(folder: Path, *, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, if anything: all sizes are compared, and the hashes of every `shares`-th file."""
    try:
        manifest = Manifest.read(folder)
        for name, record in manifest.files.items():
            found = (folder / name).stat().st_size
            if found != record.bytes:
                return f"{folder / name}: {found} bytes, the manifest says {record.bytes}"
        for name in sorted(manifest.files)[share::shares]:
            if sha256_of(folder / name) != manifest.files[name].sha256:
                return f"{folder / name}: its sha256 is not the manifest's"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder}: {type(error).__name__}: {error}"
    return None


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> FileRecord:
    """Written through to the disk."""
    data = json.dumps(content, indent=1).encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
