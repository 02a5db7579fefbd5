"""From the records of all parts to index.json, which makes a folder a data set; it is written last.

Any process may do this, and two at once do the same: the index is a function of the records.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from lpl_pretrain.config.dataset import (
    FORMAT_VERSION,
    INDEX_NAME,
    AutoencoderEntry,
    BucketEntry,
    DatasetIndex,
    LatentEntry,
    ShardEntry,
    TextEntry,
    read_index,
)
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.data.format import NO_CLASS, null_text_name
from lpl_pretrain.data.offsets import Offsets
from lpl_pretrain.encoding.classes import ClassTable
from lpl_pretrain.encoding.networks import Networks
from lpl_pretrain.encoding.plan import Plan, check_captions, first_repeated, settings_of_bytes
from lpl_pretrain.encoding.writer import RECORDS, LatentStatistics, PartRecord, offsets_path, publish, record_path
from lpl_pretrain.errors import DataError


def publish_index(config: EncodeConfig, plan: Plan, networks: Networks) -> DatasetIndex:
    """Wants a record of every part.  Raises DataError for what only the whole shows: repeated keys, contradicting classes."""
    folder = Path(config.output)
    try:
        records = [PartRecord.model_validate_json(record_path(folder, part.name).read_bytes()) for part in plan.parts]
    except FileNotFoundError:
        return read_index(folder)  # another process was faster, and has removed them
    index = make_index(config, plan, networks, records)
    _check_keys(folder, index.shards)
    for name in networks.text:
        publish(folder / null_text_name(name), [save(_null_text(networks, name))])
    for leftover in folder.glob(".latents-*.tmp"):
        leftover.unlink(missing_ok=True)
    publish(folder / INDEX_NAME, [index.model_dump_json(indent=2).encode(), b"\n"])
    remove_records(folder)
    return index


def remove_records(folder: Path) -> None:
    """Of a finished folder."""
    shutil.rmtree(folder / RECORDS, ignore_errors=True)


def make_index(config: EncodeConfig, plan: Plan, networks: Networks, records: list[PartRecord]) -> DatasetIndex:
    labels: Counter[int] = Counter()
    for record in records:
        labels.update(record.labels)
    samples, skipped = labels.total(), sum(len(record.skipped) for record in records)
    _check_skipped(config, samples, [reason for record in records for reason in record.skipped])
    captions = sum(record.captions for record in records)
    check_captions(config, captions, samples)
    classes = _classes(plan, records)
    mean, std = LatentStatistics.total(record.statistics for record in records if record.samples).mean_and_std()
    per_bucket: Counter[tuple[int, int]] = Counter()
    for bucket, entry in (shard for record in records for shard in record.shards):
        per_bucket[bucket] += entry.samples
    buckets = sorted(per_bucket)
    height, width = max(buckets, key=lambda bucket: (bucket[0] == bucket[1], per_bucket[bucket], bucket))
    shards = [entry.model_copy(update={"bucket": buckets.index(bucket)}) for record in records for bucket, entry in record.shards]
    autoencoder = networks.autoencoder
    return DatasetIndex(
        format_version=FORMAT_VERSION,
        samples=samples,
        skipped=skipped,
        classes=classes,
        class_counts=[labels[label] for label in range(len(classes))],
        captions=captions,
        text={name: _text_entry(config, networks, name) for name in networks.text},
        latent=LatentEntry(channels=autoencoder.latent_channels, height=height, width=width, mean=mean.tolist(), std=std.tolist()),
        buckets=[BucketEntry(height=h, width=w, samples=per_bucket[h, w]) for h, w in buckets],
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
        config=json.dumps(settings_of_bytes(config)),
        source_fingerprint=f"{sum(int(record.source, 16) for record in records) % 2**256:064x}",
        fingerprint=fingerprint_of(shards),
        shards=shards,
    )


def fingerprint_of(shards: Iterable[ShardEntry]) -> str:
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()


def _null_text(networks: Networks, name: str) -> dict[str, np.ndarray]:
    text = networks.texts([""])[name][0]
    arrays = {"tokens": text.floats()}
    return arrays if text.pooled is None else arrays | {"pooled": text.pooled.astype(np.float32)}


def _text_entry(config: EncodeConfig, networks: Networks, name: str) -> TextEntry:
    encoder, settings = networks.text[name], config.text[name]
    return TextEntry(
        identity=encoder.identity,
        width=encoder.width,
        max_tokens=settings.max_tokens,
        pooled_width=encoder.pooled_width if settings.pooled else None,
        storage=settings.storage,
    )


def _classes(plan: Plan, records: list[PartRecord]) -> list[str]:
    table = ClassTable()
    for part, record in zip(plan.parts, records, strict=True):
        for label in record.labels:
            table.add(f"{part.unit.origin}: a sample", None if label == NO_CLASS else label, record.class_names.get(label))
    return table.names()


def _check_skipped(config: EncodeConfig, samples: int, reasons: list[str]) -> None:
    found = samples + len(reasons)
    if len(reasons) > config.max_skipped_fraction * found or not samples:
        raise DataError(
            f"source={config.source}: {len(reasons)} of {found} pictures cannot be read, more than "
            f"max_skipped_fraction={config.max_skipped_fraction}; the first: {reasons[0] if reasons else 'there is none'}"
        )


def _check_keys(folder: Path, shards: list[ShardEntry]) -> None:
    """Over all parts: those of remote tars could not be compared before."""
    hashes = [Offsets.read(offsets_path(folder / entry.file), entry.offsets_sha256).key_hash for entry in shards]
    if (repeated := first_repeated(np.concatenate(hashes))) is not None:
        files = [entry.file for entry, mine in zip(shards, hashes, strict=True) if (mine == repeated).any()]
        raise DataError(f"{folder}: a key is there twice, in {' and '.join(files)}, wanted unique keys: rename it in the source")
