"""Publishes index.json, the last file of an encode, which makes a folder a data set.

The index is a function of the parts' records: any process may write it, and all would write the
same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from lpl_pretrain.config.dataset import (
    FORMAT_VERSION,
    INDEX_NAME,
    AutoencoderEntry,
    BucketEntry,
    DatasetIndex,
    FileEntry,
    LatentEntry,
    ShardEntry,
    TextEntry,
    index_bytes,
    sealed,
)
from lpl_pretrain.config.dataset_checks import index_problems
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.data.format import NO_CLASS, null_text_name
from lpl_pretrain.data.offsets import Offsets
from lpl_pretrain.encoding.classes import ClassTable
from lpl_pretrain.encoding.encoders import Encoders
from lpl_pretrain.encoding.latent_statistics import LatentStatistics
from lpl_pretrain.encoding.plan import Plan, content_settings, first_repeated
from lpl_pretrain.encoding.plan_file import check_plan
from lpl_pretrain.encoding.publish import publish, publish_new
from lpl_pretrain.encoding.writer import (
    RECORDS,
    PartRecord,
    move_shards,
    offsets_path,
    read_record,
)
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.log import log

_LATENTS_FILE = re.compile(r"latents-\d+-\d+-\d+-\d+x\d+\.(tar|offsets\.safetensors)")


def publish_index(config: EncodeConfig, plan: Plan, encoders: Encoders) -> DatasetIndex | None:
    """Moves all shards to the folder and publishes the index.  Every part must have a record.

    Returns None if another process has finished the folder meanwhile.  Raises DataError for
    repeated keys, contradicting classes, records of another plan.
    """
    folder = Path(config.output)
    try:
        records = [read_record(folder, part.name, plan.identity) for part in plan.parts]
        for record in records:
            move_shards(folder, record)
        null_text = {name: _publish_null_text(folder, encoders, name) for name in encoders.text}
    except FileNotFoundError:
        return None  # another process was faster and has removed the records
    index = make_index(config, plan, encoders, records, null_text)
    _check_keys(folder, index.shards)
    check_captions(
        config,
        index.samples,
        index.captions - sum(record.blank_captions for record in records),
        warn=not plan.readable,
    )
    if problems := index_problems(index):
        raise DataError(
            f"{folder}: the encoded samples are no data set: {'; '.join(problems[:3])}: encode "
            "the folder again"
        )
    _remove_stale_files(folder, {entry.file for entry in index.shards})
    check_plan(folder, plan)
    if not publish_new(folder / INDEX_NAME, [index_bytes(index)]):
        return None
    remove_records(folder)
    return index


def check_captions(config: EncodeConfig, samples: int, captions: int, *, warn: bool) -> None:
    """Checks the captions that text encoders need: raises DataError if no image has one, logs the
    fraction of images without one.
    """
    without = samples - captions
    if not config.text or not without:
        return
    if without == samples:
        raise DataError(
            f"text={sorted(config.text)}: none of the {samples} images of source={config.source} "
            "has a caption (100 % lack one), wanted .txt members, or `caption` in .json, beside "
            "images in tars: add captions, or leave text out"
        )
    if warn:
        log.warning(
            "source=%s: %d of %d images (%.3g %%) have no caption and get the embedding of the "
            "empty one",
            config.source,
            without,
            samples,
            100 * without / samples,
        )


def _publish_null_text(folder: Path, encoders: Encoders, name: str) -> FileEntry:
    """Writes the null text of one encoder: the same bytes from every process, those of the first.

    Raises FileNotFoundError if another process has finished the folder.
    """
    first_version = folder / RECORDS / null_text_name(name)
    is_first = publish_new(first_version, [save(null_text_arrays(encoders, name))])
    if is_first and (folder / INDEX_NAME).exists():
        raise FileNotFoundError(first_version)
    raw = first_version.read_bytes()
    publish(folder / null_text_name(name), [raw])
    return FileEntry(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())


def _remove_stale_files(folder: Path, files: set[str]) -> None:
    """Removes shards that are not in `files`, which an earlier data set left when its index was
    removed, and temporary files of earlier versions.
    """
    current = files | {offsets_path(folder / file).name for file in files}
    for path in [*folder.glob("latents-*"), *folder.glob(".latents-*.tmp")]:
        if path.name not in current and (
            path.suffix == ".tmp" or _LATENTS_FILE.fullmatch(path.name)
        ):
            path.unlink(missing_ok=True)


def remove_records(folder: Path) -> None:
    """Removes the parts' records of a finished folder."""
    shutil.rmtree(folder / RECORDS, ignore_errors=True)


def make_index(
    config: EncodeConfig,
    plan: Plan,
    encoders: Encoders,
    records: list[PartRecord],
    null_text: dict[str, FileEntry],
) -> DatasetIndex:
    """The index that follows from the records, with its digest.  Raises DataError."""
    labels: Counter[int] = Counter()
    for record in records:
        labels.update(record.labels)
    samples = labels.total()
    skipped = [reason for record in records for reason in record.skipped]
    _check_skipped(config, samples, skipped)
    classes = _classes(plan, records)
    buckets, shards = _buckets_and_shards(records)
    autoencoder = encoders.autoencoder
    index = DatasetIndex(
        format_version=FORMAT_VERSION,
        samples=samples,
        skipped=len(skipped),
        classes=classes,
        class_counts=[labels[label] for label in range(len(classes))],
        captions=sum(record.captions for record in records),
        text={name: text_entry(config, encoders, name) for name in encoders.text},
        null_text=null_text,
        latent=_latent_entry(autoencoder.latent_channels, buckets, records),
        buckets=buckets,
        moments_dtype=config.moments_dtype,
        flipped=config.flips,
        autoencoder=AutoencoderEntry(
            name=config.autoencoder,
            identity=autoencoder.identity,
            downscale=autoencoder.downscale,
            shift=autoencoder.shift,
            scale=autoencoder.scale,
        ),
        resolution_px=config.resolution_px,
        plan=plan.identity,
        config=json.dumps(content_settings(config)),
        source_fingerprint=f"{sum(int(record.source, 16) for record in records) % 2**256:064x}",
        fingerprint="",
        shards=shards,
    )
    return sealed(index)


def _buckets_and_shards(records: list[PartRecord]) -> tuple[list[BucketEntry], list[ShardEntry]]:
    """Buckets sorted by shape; shards with the numbers of their buckets."""
    samples: Counter[tuple[int, int]] = Counter()
    for record in records:
        for shape, entry in record.shards:
            samples[shape] += entry.samples
    shapes = sorted(samples)
    buckets = [BucketEntry(height=h, width=w, samples=samples[h, w]) for h, w in shapes]
    shards = [
        entry.model_copy(update={"bucket": shapes.index(shape)})
        for record in records
        for shape, entry in record.shards
    ]
    return buckets, shards


def _latent_entry(
    channels: int, buckets: list[BucketEntry], records: list[PartRecord]
) -> LatentEntry:
    """Statistics of all latents, and the shape of the bucket with the most samples, which is square
    if any is.
    """
    main = max(
        buckets,
        key=lambda bucket: (
            bucket.height == bucket.width,
            bucket.samples,
            (bucket.height, bucket.width),
        ),
    )
    statistics = [record.statistics for record in records if record.samples]
    mean, std = LatentStatistics.total(statistics).mean_and_std()
    return LatentEntry(
        channels=channels,
        height=main.height,
        width=main.width,
        mean=mean.tolist(),
        std=std.tolist(),
    )


def null_text_arrays(encoders: Encoders, name: str) -> dict[str, np.ndarray]:
    """`tokens` (T, D) and, if the encoder has one, `pooled` (P,) of the empty caption, float32."""
    embedding = encoders.embed_captions([""])[name][0]
    arrays = {"tokens": embedding.floats()}
    if embedding.pooled is not None:
        arrays["pooled"] = embedding.pooled.astype(np.float32)
    return arrays


def text_entry(config: EncodeConfig, encoders: Encoders, name: str) -> TextEntry:
    """Entry of a text encoder in index.json."""
    encoder = encoders.text[name]
    settings = config.text[name]
    return TextEntry(
        identity=encoder.identity,
        width=encoder.width,
        max_tokens=settings.max_tokens,
        pooled_width=encoder.pooled_width if settings.pooled else None,
        storage=settings.storage,
    )


def _classes(plan: Plan, records: list[PartRecord]) -> list[str]:
    """Class names of all parts.  Raises DataError if parts contradict each other."""
    table = ClassTable()
    for part, record in zip(plan.parts, records, strict=True):
        for label in record.labels:
            table.add(
                f"{part.unit.origin}: a sample",
                None if label == NO_CLASS else label,
                record.class_names.get(label),
            )
    return table.names()


def _check_skipped(config: EncodeConfig, samples: int, reasons: list[str]) -> None:
    """Raises DataError if too many images, or all, were skipped."""
    total = samples + len(reasons)
    if len(reasons) > config.max_skipped_fraction * total or not samples:
        raise DataError(
            f"source={config.source}: {len(reasons)} of {total} images cannot be read, more than "
            f"max_skipped_fraction={config.max_skipped_fraction}; the first: "
            f"{reasons[0] if reasons else 'there is none'}"
        )


def _check_keys(folder: Path, shards: list[ShardEntry]) -> None:
    """Raises DataError for a key that two shards have; plans cannot compare keys of remote tars."""
    hashes = [Offsets.read(offsets_path(folder / entry.file), entry).key_hash for entry in shards]
    if (repeated := first_repeated(np.concatenate(hashes))) is not None:
        files = [
            entry.file
            for entry, shard_hashes in zip(shards, hashes, strict=True)
            if (shard_hashes == repeated).any()
        ]
        raise DataError(
            f"{folder}: a key is there twice, in {' and '.join(files)}, wanted unique keys: rename "
            "it in the source"
        )
