"""Writes the shards of one part: files in a staging folder first, then the part's record, then the
files are moved to the data folder.

One process encodes a part without communication, to shards whose bytes depend on the part alone.
Any number of processes can therefore write to one folder, and a part without a record is encoded
again.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from lpl_pretrain.config.dataset import INDEX_NAME, ShardEntry
from lpl_pretrain.data.format import NO_CLASS, Sample, shard_name
from lpl_pretrain.data.offsets import SUFFIX, ShardBuilder
from lpl_pretrain.encoding.latent_statistics import LatentStatistics
from lpl_pretrain.encoding.publish import disk_error, publish_new, write_file
from lpl_pretrain.errors import DataError

RECORDS = ".encode"
"""Folder of the parts' records until index.json replaces them."""


class PartRecord(BaseModel):
    """Contribution of one part to index.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    plan: str
    """Identity of the plan that the part belongs to."""
    staging: str
    """Folder inside RECORDS that its files were written to; they are moved to the data folder once
    this record exists.
    """
    samples: int
    skipped: list[str]
    """Reason of each skipped image."""
    labels: dict[int, int]
    """Class id -> number of samples; NO_CLASS (-1) for those without one."""
    class_names: dict[int, str]
    captions: int
    blank_captions: int
    """Captions of spaces only."""
    source: str
    """Sum modulo 2^256 of the samples' digests (`sample_digest`), in hexadecimal."""
    statistics: dict[str, list[float]]
    shards: list[tuple[tuple[int, int], ShardEntry]]
    """((height, width) of the latents, entry) of each shard."""


class Superseded(Exception):
    """Another process has recorded this part or finished the folder; this process's files are not
    needed.
    """


class PartWriter:
    """Writer of one part: `add` every sample, then `finish`.  Shards are built in memory, one per
    bucket at a time.

    Files are written to a staging folder of this writer.  The part's record is created exclusively
    and names that folder; only then are the files moved to the data folder.  Of two processes that
    encode one part by mistake, the first to finish wins, and a file that a record or an index
    describes is never written again.
    """

    def __init__(
        self, folder: Path, part: str, channels: int, shard_samples: int, plan: str
    ) -> None:
        self.folder = folder
        self.part = part
        self.shard_samples = shard_samples
        self.plan = plan
        self.staging = folder / RECORDS / f"{part}.{secrets.token_hex(4)}"
        self.statistics = LatentStatistics(channels)
        self.labels: Counter[int] = Counter()
        self.captions = 0
        self.blank_captions = 0
        self._open: dict[tuple[int, int], ShardBuilder] = {}  # bucket -> incomplete shard
        self._shards: list[tuple[tuple[int, int], ShardEntry]] = []
        self._keys: set[str] = set()

    def add(self, sample: Sample, moments: np.ndarray) -> None:
        """Adds a sample.  `moments`: (2C, H, W) those of the sample in floating point.

        Raises DataError for a repeated key.
        """
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
        """Writes the remaining shards and the record, then moves the shards to the data folder.

        `source`: sum of the samples' digests modulo 2^256.  Raises Superseded.
        """
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
        with self._superseded_if_removed():
            is_first = publish_new(
                record_path(self.folder, self.part), [record.model_dump_json().encode()]
            )
        # records are removed after the index is published
        if not is_first or (self.folder / INDEX_NAME).exists():
            raise Superseded(self.part)
        move_shards(self.folder, record)
        for leftover in (self.folder / RECORDS).glob(f"{self.part}.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def discard(self) -> None:
        """Removes the staging folder, unless the part's record names it: then `move_shards` still
        has to move its files.
        """
        try:
            recorded = self.staging.name in record_path(self.folder, self.part).read_text()
        except FileNotFoundError:
            recorded = False
        except OSError:  # unknown: the folder is removed with the records of a finished encode
            recorded = True
        if not recorded:
            shutil.rmtree(self.staging, ignore_errors=True)

    def _write(self, bucket: tuple[int, int]) -> None:
        """Writes the shard of `bucket` to the staging folder."""
        chunks, offsets = self._open.pop(bucket).finish()
        raw_offsets = offsets.to_bytes()
        number = sum(other == bucket for other, _ in self._shards)
        name = shard_name(self.part, number, f"{bucket[0]}x{bucket[1]}")
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        with self._superseded_if_removed():
            self.staging.mkdir(exist_ok=True)
            write_file(self.staging / name, chunks)
            write_file(offsets_path(self.staging / name), [raw_offsets])
        entry = ShardEntry(
            file=name,
            bucket=0,  # replaced when all buckets are known
            samples=len(offsets),
            bytes=sum(map(len, chunks)),
            sha256=digest.hexdigest(),
            offsets_sha256=hashlib.sha256(raw_offsets).hexdigest(),
        )
        self._shards.append((bucket, entry))

    @contextmanager
    def _superseded_if_removed(self) -> Iterator[None]:
        """Raises Superseded for an error that is due to another process: the one that records the
        part removes the staging folders of others.
        """
        try:
            yield
        except (FileNotFoundError, DataError):
            if record_path(self.folder, self.part).exists() or (self.folder / INDEX_NAME).exists():
                raise Superseded(self.part) from None
            raise


def read_record(folder: Path, part: str, plan: str) -> PartRecord:
    """Record of a part.  Raises FileNotFoundError, and DataError for a corrupt record or one of
    another plan.
    """
    path = record_path(folder, part)
    remedy = f"remove {path} and run the same command again"
    try:
        record = PartRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path}: corrupt ({error.error_count()} fields): {remedy}") from None
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


def move_shards(folder: Path, record: PartRecord) -> None:
    """Moves the files of a record from its staging folder to the data folder, except those that
    another process has moved.

    Raises DataError for a file that is in neither.
    """
    staging = folder / RECORDS / record.staging
    for _, entry in record.shards:
        for name in (entry.file, offsets_path(folder / entry.file).name):
            try:
                os.replace(staging / name, folder / name)
            except FileNotFoundError:
                if not (folder / name).is_file():
                    raise DataError(
                        f"{folder / name}: missing, though the record of its part lists it: remove "
                        f"{folder / RECORDS} and run the same command again"
                    ) from None
            except OSError as error:
                raise disk_error(folder / name, error, entry.bytes) from None


def record_path(folder: Path, part: str) -> Path:
    return folder / RECORDS / f"part-{part}.json"


def offsets_path(shard: Path) -> Path:
    return shard.with_suffix(SUFFIX)
