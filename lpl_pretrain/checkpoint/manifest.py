"""Reads and writes manifest.json, which holds the size and sha256 of every other file of a
checkpoint and is written last.

A folder without a manifest is not a checkpoint; one whose files disagree with it is damaged; one of
a newer format is refused.  Format 3 added `digest`, the sha256 of the manifest's other keys; format
2 is still read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from lpl_pretrain.config.rundir import MANIFEST
from lpl_pretrain.config.steps import STEP_NAME, step_name
from lpl_pretrain.config.strict_json import JSONError, is_count, key_problem, read_json, shown
from lpl_pretrain.errors import CheckpointError, DamagedCheckpointError
from lpl_pretrain.runtime.log import log

FORMAT = 3
WITHOUT_DIGEST = 2
READABLE = (WITHOUT_DIGEST, FORMAT)
DIGEST = "digest"
INDEX = "index.json"
STATE = "state.json"
SHA256 = re.compile(r"[0-9a-f]{64}")
IDENTITY = re.compile(r"[0-9a-f]{0,64}")


def rank_file(rank: int) -> str:
    """File with the ranges of one rank."""
    return f"pieces_{rank:05d}.safetensors"


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    step: int
    samples_seen: int
    optimizer_steps: int
    """Updates applied: `step` minus the skipped ones."""
    strategy: str
    """Class name, for people: any strategy can read the checkpoint."""
    world_size: int
    """Number of ranks that saved it; any number can read it."""
    identity: str
    """Hash of the configuration keys that determine the result (config/check.py)."""
    files: dict[str, FileRecord]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Raises CheckpointError for content that `read` would refuse."""
        content = asdict(self)
        if (problem := _problem(content)) is not None:
            raise CheckpointError(f"{folder / MANIFEST}: {problem}")
        write_json(folder / MANIFEST, {**content, DIGEST: digest_of(content)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads and checks a manifest.  Raises DamagedCheckpointError, or CheckpointError for an
        unknown format.
        """
        path = folder / MANIFEST
        try:
            content = read_json(regular_file(path))
        except JSONError as error:
            raise DamagedCheckpointError(str(error)) from None
        version = content.get("format") if isinstance(content, dict) else None
        _check_format(folder, version)
        digest = content.pop(DIGEST, None) if version == FORMAT else None
        problem = _problem(content)
        if problem is None and version == FORMAT and digest != digest_of(content):
            problem = (
                f"{DIGEST}: found {shown(digest)}, its content has another one: it was "
                "changed after it was written"
            )
        if problem is None:
            problem = _folder_problem(folder, content["step"])
        if problem is not None:
            raise DamagedCheckpointError(f"{path}: {problem}")
        if version == WITHOUT_DIGEST:
            _note_old_format()
        records = {name: FileRecord(**record) for name, record in content["files"].items()}
        return cls(**{**content, "files": records})

    def check_sizes(self, folder: Path) -> None:
        """Raises DamagedCheckpointError unless every file is a regular file of the right size.

        The files' content is not read.
        """
        for name, record in self.files.items():
            size = regular_file(folder / name).stat().st_size
            if size != record.bytes:
                raise DamagedCheckpointError(
                    f"{folder / name}: {size} bytes, the manifest says {record.bytes}"
                )


def digest_of(content: dict[str, Any]) -> str:
    """sha256 of a manifest without its `digest`, with sorted keys and no spaces."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def regular_file(path: Path) -> Path:
    """Returns `path`.  Raises DamagedCheckpointError if it is missing, a link, a directory or
    anything else but a regular file.
    """
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DamagedCheckpointError(f"{path}: {reason}") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link"}
        kind = kinds.get(stat.S_IFMT(mode), "a pipe, a socket or a device")
        raise DamagedCheckpointError(f"{path}: is {kind}, wanted a regular file")
    return path


def expected_files(world_size: int) -> Iterator[str]:
    """Yields the names of all files of a checkpoint but its manifest."""
    yield INDEX
    yield STATE
    yield from map(rank_file, range(world_size))


def write_json(path: Path, content: Any) -> FileRecord:
    """Writes and syncs a JSON file."""
    data = json.dumps(content, indent=1).encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that renames and new names in it survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_format(folder: Path, version: Any) -> None:
    """Raises CheckpointError for a format that this version does not read."""
    if type(version) is not int or version in READABLE:
        return
    known = " and ".join(map(str, READABLE))
    remedy = "update lpl_pretrain" if version > FORMAT else "go on with the version that saved it"
    raise CheckpointError(
        f"{folder}: checkpoint format {version}, this version reads {known}: {remedy}"
    )


def _folder_problem(folder: Path, step: int) -> str | None:
    """Describes a contradiction between `step` and the name of the folder, if any."""
    if not STEP_NAME.fullmatch(folder.name) or folder.name == step_name(step):
        return None
    return f"step: found {step}, the folder is called {folder.name}: it was renamed or copied"


def _problem(content: Any) -> str | None:
    """Describes the first invalid key, type or value of a manifest, if any."""
    keys = frozenset(field.name for field in fields(Manifest))
    if (problem := key_problem(content, keys)) is not None:
        return problem
    for key in ("step", "samples_seen", "optimizer_steps", "world_size", "format"):
        if not is_count(content[key]):
            return f"{key}: found {shown(content[key])}, wanted an integer from 0"
    step = content["step"]
    updates = content["optimizer_steps"]
    samples_seen = content["samples_seen"]
    if updates > step:
        return f"optimizer_steps: found {updates}, wanted at most step={step}"
    if samples_seen % step if step else samples_seen:
        return f"samples_seen: found {samples_seen}, wanted a multiple of step={step}"
    for key, pattern in (("strategy", re.compile(r"\w{1,100}")), ("identity", IDENTITY)):
        if not (isinstance(content[key], str) and pattern.fullmatch(content[key])):
            return f"{key}: found {shown(content[key])}, wanted {pattern.pattern}"
    return _files_problem(content["files"], content["world_size"])


def _files_problem(files: Any, world_size: int) -> str | None:
    if not isinstance(files, dict):
        return f"files: found {shown(files)}, wanted an object"
    if world_size < 1 or len(files) != world_size + 2:
        return (
            f"files: {len(files)} are listed, wanted {INDEX}, {STATE} and one for each of "
            f"{world_size} ranks"
        )
    for name in expected_files(world_size):
        record = files.get(name)
        if record is None:
            return f"files: {name} is not listed"
        if (problem := key_problem(record, frozenset({"bytes", "sha256"}))) is not None:
            return f"files.{name}: {problem}"
        if not is_count(record["bytes"]):
            return f"files.{name}.bytes: found {shown(record['bytes'])}, wanted an integer from 0"
        if not (isinstance(record["sha256"], str) and SHA256.fullmatch(record["sha256"])):
            return (
                f"files.{name}.sha256: found {shown(record['sha256'])}, wanted 64 "
                "hexadecimal digits"
            )
    return None


@cache
def _note_old_format() -> None:
    """Logs, once in a process, that a manifest without a digest is read."""
    log.info(
        "checkpoint format %d has no digest of its manifest: its fields are checked instead",
        WITHOUT_DIGEST,
    )
