"""What makes a checkpoint folder complete: manifest.json, written last, with the size and sha256 of
every other file.

A folder without a manifest is no checkpoint; one whose files disagree with it is damaged; one of a
newer format is refused. Format 3 added `digest`, the sha256 of the manifest's other keys.  Format 2
has none and is still read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
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
INDEX, STATE = "index.json", "state.json"
SHA256 = re.compile(r"[0-9a-f]{64}")
IDENTITY = re.compile(r"[0-9a-f]{0,64}")


def pieces_file(rank: int) -> str:
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
    """Updates applied: `step` less those that were left out."""
    strategy: str
    """Class and world size of the run that saved it: for people, reading needs neither."""
    world_size: int
    identity: str
    """Hash of what the run learns by (config/check.py)."""
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
        """Raises DamagedCheckpointError, or CheckpointError for a format that this version does not
        know.
        """
        path = folder / MANIFEST
        try:
            content = read_json(regular_file(path))
        except JSONError as error:
            raise DamagedCheckpointError(str(error)) from None
        found = content.get("format") if isinstance(content, dict) else None
        if type(found) is int and found not in READABLE:
            remedy = (
                "update lpl_pretrain" if found > FORMAT else "go on with the version that saved it"
            )
            known = " and ".join(map(str, READABLE))
            raise CheckpointError(
                f"{folder}: checkpoint format {found}, this version reads {known}: {remedy}"
            )
        digest = content.pop(DIGEST, None) if found == FORMAT else None
        problem = _problem(content)
        if problem is None and found == FORMAT and digest != digest_of(content):
            problem = (
                f"{DIGEST}: found {shown(digest)}, its content has another one: it was "
                "changed after it was written"
            )
        if (
            problem is None
            and STEP_NAME.fullmatch(folder.name)
            and folder.name != step_name(content["step"])
        ):
            problem = (
                f"step: found {content['step']}, the folder is called {folder.name}: it was "
                "renamed or copied"
            )
        if problem is not None:
            raise DamagedCheckpointError(f"{path}: {problem}")
        if found == WITHOUT_DIGEST:
            _note_old_format(str(folder))
        return cls(
            **{
                **content,
                "files": {name: FileRecord(**record) for name, record in content["files"].items()},
            }
        )

    def check_sizes(self, folder: Path) -> None:
        """Raises DamagedCheckpointError unless every file is there, is no link, and has its size.
        Reads no content.
        """
        for name, record in self.files.items():
            found = regular_file(folder / name).stat().st_size
            if found != record.bytes:
                raise DamagedCheckpointError(
                    f"{folder / name}: {found} bytes, the manifest says {record.bytes}"
                )


def digest_of(content: dict[str, Any]) -> str:
    """sha256 of the keys of a manifest, without its `digest`, in one order and spacing."""
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def regular_file(path: Path) -> Path:
    """`path`.  Raises DamagedCheckpointError for what is missing, a link, a directory, or anything
    else that is no file.
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
    """Every file of a checkpoint but its manifest."""
    yield INDEX
    yield STATE
    yield from map(pieces_file, range(world_size))


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


def _problem(content: Any) -> str | None:
    """What is wrong with a manifest's keys, types and values, if anything."""
    keys = frozenset(field.name for field in fields(Manifest))
    if (problem := key_problem(content, keys)) is not None:
        return problem
    step, seen, updates = (content[key] for key in ("step", "samples_seen", "optimizer_steps"))
    for key in ("step", "samples_seen", "optimizer_steps", "world_size", "format"):
        if not is_count(content[key]):
            return f"{key}: found {shown(content[key])}, wanted an integer from 0"
    if updates > step:
        return f"optimizer_steps: found {updates}, wanted at most step={step}"
    if seen % step if step else seen:
        return f"samples_seen: found {seen}, wanted a multiple of step={step}"
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


@lru_cache(maxsize=1)
def _once(message: str) -> None:
    log.info("%s", message)


def _note_old_format(folder: str) -> None:
    """Log once in a process that manifests without a digest are read."""
    _once(
        f"checkpoint format {WITHOUT_DIGEST} has no digest of its manifest: its fields are "
        "checked instead"
    )
