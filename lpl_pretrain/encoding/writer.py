"""How a part of the pictures becomes finished shards: files in a folder of their own, then the
part's record, then their place.

A part is what one process encodes without asking anybody: it goes to shards of its own, whose bytes
depend on the part alone. So any number of processes write one folder, and a part without a record
is simply done again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from lpl_pretrain.config.dataset import INDEX_NAME, ShardEntry
from lpl_pretrain.data.format import NO_CLASS, Sample, shard_name
from lpl_pretrain.data.offsets import SUFFIX, ShardBuilder
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.atomic import atomic_write, remove_leftovers, temporary_name

RECORDS = ".encode"
"""Folder of the parts' records, until index.json takes their place."""
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
"""How file systems without hard links refuse one."""


class PartRecord(BaseModel):
    """What index.json needs to know of one part."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    plan: str
    """Identity of the plan that the part belongs to."""
    staging: str
    """Folder, inside RECORDS, that its files were written to; they are moved to their place after
    this record is there.
    """
    samples: int
    skipped: list[str]
    """Why each picture was left out."""
    labels: dict[int, int]
    """Class id -> samples; NO_CLASS (-1) counts those without one."""
    class_names: dict[int, str]
    captions: int
    blank_captions: int
    """Captions of spaces only."""
    source: str
    """Sum modulo 2^256 of the sha256 of each picture's facts, in hexadecimal: it does not depend on
    how parts are cut.
    """
    statistics: dict[str, list[float]]
    shards: list[tuple[tuple[int, int], ShardEntry]]
    """((height, width) in latent positions, entry) of each."""


class LatentStatistics:
    """Per-channel sums in float64 over samples and positions; sums, so that parts made apart can be
    added.
    """

    def __init__(self, channels: int) -> None:
        self.positions = 0.0
        self.mean, self.mean_square, self.variance = np.zeros((3, channels))

    def add(self, moments: np.ndarray) -> None:
        """(2C, H, W), floating point."""
        mean, std = np.split(moments.astype(np.float64), 2)
        self.positions += mean[0].size
        self.mean += mean.sum(axis=(1, 2))
        self.mean_square += np.square(mean).sum(axis=(1, 2))
        self.variance += np.square(std).sum(axis=(1, 2))

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Of a draw from the posterior: its variance is the variance of the means plus the mean of
        the variances.
        """
        mean = self.mean / self.positions
        return mean, np.sqrt(
            self.mean_square / self.positions - np.square(mean) + self.variance / self.positions
        )

    def to_lists(self) -> dict[str, list[float]]:
        sums = {"mean": self.mean, "mean_square": self.mean_square, "variance": self.variance}
        return {
            "positions": [self.positions],
            **{name: values.tolist() for name, values in sums.items()},
        }

    @classmethod
    def total(cls, parts: Iterable[dict[str, list[float]]]) -> LatentStatistics:
        """In the order given: floating-point sums depend on it."""
        whole: LatentStatistics | None = None
        for part in parts:
            whole = whole or cls(len(part["mean"]))
            whole.positions += part["positions"][0]
            for name in ("mean", "mean_square", "variance"):
                setattr(whole, name, getattr(whole, name) + np.array(part[name]))
        assert whole is not None, "no part"
        return whole


class Superseded(Exception):
    """Another process has recorded this part, or finished the folder: what was made of it here is
    not needed.
    """


class PartWriter:
    """`add` every sample of a part, then `finish`.  Shards are put together in memory, one for each
    bucket at a time.

    Files are written to a folder of this writer alone.  The part's record is created exclusively
    and names that folder; only then do the files go to their place.  So of two processes that
    encode one part by mistake, the first to finish counts, and a file that a record or an index
    describes is never written again.
    """

    def __init__(
        self, folder: Path, part: str, channels: int, shard_samples: int, plan: str
    ) -> None:
        self.folder, self.part, self.shard_samples, self.plan = folder, part, shard_samples, plan
        self.staging = folder / RECORDS / f"{part}.{secrets.token_hex(4)}"
        self.statistics = LatentStatistics(channels)
        self.labels: Counter[int] = Counter()
        self.captions = self.blank_captions = 0
        self._open: dict[tuple[int, int], ShardBuilder] = {}  # bucket -> shard in the making
        self._shards: list[tuple[tuple[int, int], ShardEntry]] = []
        self._keys: set[str] = set()

    def add(self, sample: Sample, moments: np.ndarray) -> None:
        """`moments`: those of the sample as floating-point numbers, for the statistics."""
        if sample.key in self._keys:
            raise DataError(
                f"part {self.part}: key {sample.key!r} is there twice, wanted unique keys: "
                "rename one"
            )
        self._keys.add(sample.key)
        bucket = moments.shape[1:]
        shard = self._open.setdefault(bucket, ShardBuilder())
        shard.samples.append(sample)
        self.statistics.add(moments)
        self.labels[NO_CLASS if sample.label is None else sample.label] += 1
        self.captions += sample.caption is not None
        self.blank_captions += sample.caption is not None and not sample.caption.strip()
        if len(shard) == self.shard_samples:
            self._write(bucket)

    def finish(self, *, skipped: list[str], class_names: dict[int, str], source: int) -> None:
        for bucket in sorted(self._open):
            self._write(bucket)
        record = PartRecord(
            plan=self.plan,
            staging=self.staging.name,
            samples=sum(self.labels.values()),
            skipped=skipped,
            labels=dict(sorted(self.labels.items())),
            class_names=dict(sorted(class_names.items())),
            captions=self.captions,
            blank_captions=self.blank_captions,
            source=f"{source:064x}",
            statistics=self.statistics.to_lists(),
            shards=self._shards,
        )
        with self._superseded_when_gone():
            is_first = publish_new(
                record_path(self.folder, self.part), [record.model_dump_json().encode()]
            )
        if (
            not is_first or (self.folder / INDEX_NAME).exists()
        ):  # records disappear after the index is there
            raise Superseded(self.part)
        place_shards(self.folder, record)
        for leftover in (self.folder / RECORDS).glob(f"{self.part}.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was written, unless the part's record names it: then it is what
        `place_shards` has still to move.
        """
        try:
            recorded = self.staging.name in record_path(self.folder, self.part).read_text()
        except FileNotFoundError:
            recorded = False
        except OSError:  # nobody can know: it goes with the records when the folder is finished
            recorded = True
        if not recorded:
            shutil.rmtree(self.staging, ignore_errors=True)

    def _write(self, bucket: tuple[int, int]) -> None:
        pieces, offsets = self._open.pop(bucket).finish()
        raw_offsets = offsets.to_bytes()
        name = shard_name(
            self.part, sum(other == bucket for other, _ in self._shards), f"{bucket[0]}x{bucket[1]}"
        )
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        with self._superseded_when_gone():
            self.staging.mkdir(exist_ok=True)
            write_file(self.staging / name, pieces)
            write_file(offsets_path(self.staging / name), [raw_offsets])
        entry = ShardEntry(
            file=name,
            bucket=0,  # numbers are given when all buckets are known
            samples=len(offsets),
            bytes=sum(map(len, pieces)),
            sha256=digest.hexdigest(),
            offsets_sha256=hashlib.sha256(raw_offsets).hexdigest(),
        )
        self._shards.append((bucket, entry))

    @contextmanager
    def _superseded_when_gone(self) -> Iterator[None]:
        """Whoever records a part removes the folders of others that work on it."""
        try:
            yield
        except (FileNotFoundError, DataError):
            if record_path(self.folder, self.part).exists() or (self.folder / INDEX_NAME).exists():
                raise Superseded(self.part) from None
            raise


def read_record(folder: Path, part: str, plan: str) -> PartRecord:
    """Raises FileNotFoundError, and DataError for a record of another plan or a damaged one."""
    path = record_path(folder, part)
    remedy = f"remove {path} and run the same command again"
    try:
        record = PartRecord.model_validate_json(path.read_bytes())
    except ValidationError as problem:
        raise DataError(f"{path}: damaged ({problem.error_count()} fields): {remedy}") from None
    if record.plan != plan:
        raise DataError(
            f"{path}: belongs to plan {record.plan[:12]}, wanted {plan[:12]}: name another output, "
            f"or {remedy}"
        )
    names = [entry.file for _, entry in record.shards]
    if not re.fullmatch(rf"{part}\.[0-9a-f]{{8}}", record.staging) or not all(
        re.fullmatch(rf"latents-{part}-[0-9]+-[0-9]+x[0-9]+\.tar", name) for name in names
    ):
        raise DataError(f"{path}: names files of other parts: {remedy}")
    return record


def place_shards(folder: Path, record: PartRecord) -> None:
    """Moves what a record describes to its place; the rest of it, when another process was killed
    or is at it.

    Raises DataError when something is missing.
    """
    staging = folder / RECORDS / record.staging
    for _, entry in record.shards:
        for name in (entry.file, offsets_path(folder / entry.file).name):
            try:
                os.replace(staging / name, folder / name)
            except FileNotFoundError:
                if not (folder / name).is_file():
                    raise DataError(
                        f"{folder / name}: missing, though a part that is recorded has it: remove "
                        f"{folder / RECORDS} and run "
                        "the same command again"
                    ) from None
            except OSError as problem:
                raise _no_room(folder / name, problem, entry.bytes) from None


def record_path(folder: Path, part: str) -> Path:
    return folder / RECORDS / f"part-{part}.json"


def offsets_path(shard: Path) -> Path:
    return shard.with_suffix(SUFFIX)


def publish(path: Path, pieces: list[bytes]) -> None:
    """Raises DataError when there is no room; what was there before stays."""
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            file.writelines(pieces)
    except OSError as problem:
        raise _no_room(path, problem, sum(map(len, pieces))) from None


def publish_new(path: Path, pieces: list[bytes]) -> bool:
    """Creates a whole file unless there is one already, which stays: then False.  Of several
    processes one succeeds.

    Raises FileNotFoundError when the folder is gone, DataError when there is no room.
    """
    temporary = temporary_name(path)
    try:
        remove_leftovers(path.parent)
        write_file(temporary, pieces)
        try:
            os.link(temporary, path)  # atomic on NFS too
        except FileExistsError:
            return (
                os.stat(temporary).st_nlink > 1
            )  # NFS may say so of a link that its first try has made
        except OSError as problem:
            if problem.errno not in NO_LINKS:
                raise
            return _create(path, pieces)
        return True
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise _no_room(path, problem, sum(map(len, pieces))) from None
    finally:
        temporary.unlink(missing_ok=True)


def _create(path: Path, pieces: list[bytes]) -> bool:
    """As `publish_new`, where there are no hard links; a kill here leaves a part of the file, which
    its reader refuses.
    """
    try:
        with open(path, "xb", buffering=0) as file:
            file.write(b"".join(pieces))
    except FileExistsError:
        return False
    return True


def write_file(path: Path, pieces: list[bytes]) -> None:
    """Raises FileNotFoundError when the folder is gone, DataError when there is no room."""
    try:
        with open(path, "wb") as file:
            file.writelines(pieces)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise _no_room(path, problem, sum(map(len, pieces))) from None


def _no_room(path: Path, problem: OSError, size: int) -> DataError:
    return DataError(
        f"{path}: {problem.strerror} while writing {size / 2**20:.1f} MiB: make room and run the "
        "same command again; "
        "finished parts are kept"
    )
