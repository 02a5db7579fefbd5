"""The first and the last file of an encode: the plan's, and index.json, which makes a folder a data
set.

Both are created exclusively: a folder is one plan's from its first file on.  Any process may write
the index, and two at once would write the same: it is a function of the records.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
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
from lpl_pretrain.encoding.encoders import Networks
from lpl_pretrain.encoding.plan import Plan, first_repeated, settings_of_bytes
from lpl_pretrain.encoding.writer import (
    RECORDS,
    LatentStatistics,
    PartRecord,
    offsets_path,
    place_shards,
    publish,
    publish_new,
    read_record,
)
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.log import log

PLAN_NAME = "plan.txt"
PLAN_WAIT_S, PLAN_TRIES = 0.1, 50
_STRAY = re.compile(r"latents-\d+-\d+-\d+-\d+x\d+\.(tar|offsets\.safetensors)")


def begin(folder: Path, plan: Plan) -> None:
    """Creates the plan's file, exclusively, before anything else lies in the folder.

    Raises DataError when another plan's is there: what another configuration began is never mixed
    in.
    """
    for _ in range(PLAN_TRIES):
        try:
            (folder / RECORDS).mkdir(parents=True, exist_ok=True)
            publish_new(folder / RECORDS / PLAN_NAME, [plan.identity.encode()])
            break
        except FileNotFoundError:
            continue  # another process finished this folder, and was removing its records
        except OSError as problem:
            raise DataError(
                f"output={folder}: cannot be written ({problem}): name another output"
            ) from None
    check_plan(folder, plan)


def check_plan(folder: Path, plan: Plan) -> None:
    """Raises DataError unless the folder is this plan's, or finished."""
    found = ""
    for _ in range(PLAN_TRIES):  # without hard links the file may be seen before its content
        try:
            found = (folder / RECORDS / PLAN_NAME).read_text(errors="replace")
        except FileNotFoundError:
            return
        if len(found) >= len(plan.identity):
            break
        time.sleep(PLAN_WAIT_S)
    if found == plan.identity:
        return
    whose = "other inputs"
    if found == plan.earlier_identity:
        whose = "an earlier version, which ignored colour profiles"
    raise DataError(
        f"output={folder}: holds the unfinished work of {whose} (plan {found[:12]} there, "
        f"{plan.identity[:12]} now): "
        "go on with those, name another output, or remove that folder"
    )


def publish_index(config: EncodeConfig, plan: Plan, networks: Networks) -> DatasetIndex | None:
    """Wants a record of every part.  None when another process has finished the folder meanwhile.

    Raises DataError for what only the whole shows: repeated keys, contradicting classes, records of
    another plan.
    """
    folder = Path(config.output)
    try:
        records = [read_record(folder, part.name, plan.identity) for part in plan.parts]
        for record in records:
            place_shards(folder, record)
        null_text = {name: _publish_null_text(folder, networks, name) for name in networks.text}
    except FileNotFoundError:
        return None  # another process was faster, and has removed them
    index = make_index(config, plan, networks, records, null_text)
    _check_keys(folder, index.shards)
    check_captions(
        config,
        index.samples,
        index.captions - sum(record.blank_captions for record in records),
        warn=not plan.readable,
    )
    if problems := index_problems(index):
        raise DataError(
            f"{folder}: what was encoded is no data set: {'; '.join(problems[:3])}: encode the "
            "folder again"
        )
    _remove_strays(folder, {entry.file for entry in index.shards})
    check_plan(folder, plan)
    if not publish_new(folder / INDEX_NAME, [index_bytes(index)]):
        return None
    remove_records(folder)
    return index


def check_captions(config: EncodeConfig, samples: int, captions: int, *, warn: bool) -> None:
    """Raises DataError when `text` has no caption to read; logs the fraction when some pictures
    have none.
    """
    without = samples - captions
    if not config.text or not without:
        return
    if without == samples:
        raise DataError(
            f"text={sorted(config.text)}: none of the {samples} pictures of source={config.source} "
            "has a caption (100 % lack one), "
            "wanted .txt members, or `caption` in .json, beside pictures in tars: add captions, or "
            "leave text out"
        )
    if warn:
        log.warning(
            "source=%s: %d of %d pictures (%.3g %%) have no caption and get the embedding of the "
            "empty one",
            config.source,
            without,
            samples,
            100 * without / samples,
        )


def _publish_null_text(folder: Path, networks: Networks, name: str) -> FileEntry:
    """Of several processes the first says which bytes count.  Raises FileNotFoundError when the
    folder is finished.
    """
    chosen = folder / RECORDS / null_text_name(name)
    is_first = publish_new(chosen, [save(null_text_arrays(networks, name))])
    if is_first and (folder / INDEX_NAME).exists():
        raise FileNotFoundError(chosen)
    raw = chosen.read_bytes()
    publish(folder / null_text_name(name), [raw])
    return FileEntry(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())


def _remove_strays(folder: Path, files: set[str]) -> None:
    """Shards that an earlier data set left here when its index was removed; temporary files of
    earlier versions.
    """
    wanted = files | {offsets_path(folder / file).name for file in files}
    for path in [*folder.glob("latents-*"), *folder.glob(".latents-*.tmp")]:
        if path.name not in wanted and (path.suffix == ".tmp" or _STRAY.fullmatch(path.name)):
            path.unlink(missing_ok=True)


def remove_records(folder: Path) -> None:
    """Of a finished folder."""
    shutil.rmtree(folder / RECORDS, ignore_errors=True)


def make_index(
    config: EncodeConfig,
    plan: Plan,
    networks: Networks,
    records: list[PartRecord],
    null_text: dict[str, FileEntry],
) -> DatasetIndex:
    labels: Counter[int] = Counter()
    for record in records:
        labels.update(record.labels)
    samples, skipped = labels.total(), sum(len(record.skipped) for record in records)
    _check_skipped(config, samples, [reason for record in records for reason in record.skipped])
    classes = _classes(plan, records)
    mean, std = LatentStatistics.total(
        record.statistics for record in records if record.samples
    ).mean_and_std()
    per_bucket: Counter[tuple[int, int]] = Counter()
    for bucket, entry in (shard for record in records for shard in record.shards):
        per_bucket[bucket] += entry.samples
    buckets = sorted(per_bucket)
    height, width = max(
        buckets, key=lambda bucket: (bucket[0] == bucket[1], per_bucket[bucket], bucket)
    )
    shards = [
        entry.model_copy(update={"bucket": buckets.index(bucket)})
        for record in records
        for bucket, entry in record.shards
    ]
    autoencoder = networks.autoencoder
    index = DatasetIndex(
        format_version=FORMAT_VERSION,
        samples=samples,
        skipped=skipped,
        classes=classes,
        class_counts=[labels[label] for label in range(len(classes))],
        captions=sum(record.captions for record in records),
        text={name: text_entry(config, networks, name) for name in networks.text},
        null_text=null_text,
        latent=LatentEntry(
            channels=autoencoder.latent_channels,
            height=height,
            width=width,
            mean=mean.tolist(),
            std=std.tolist(),
        ),
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
        fingerprint="",
        shards=shards,
    )
    return sealed(index)


def null_text_arrays(networks: Networks, name: str) -> dict[str, np.ndarray]:
    text = networks.texts([""])[name][0]
    arrays = {"tokens": text.floats()}
    return arrays if text.pooled is None else arrays | {"pooled": text.pooled.astype(np.float32)}


def text_entry(config: EncodeConfig, networks: Networks, name: str) -> TextEntry:
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
            table.add(
                f"{part.unit.origin}: a sample",
                None if label == NO_CLASS else label,
                record.class_names.get(label),
            )
    return table.names()


def _check_skipped(config: EncodeConfig, samples: int, reasons: list[str]) -> None:
    found = samples + len(reasons)
    if len(reasons) > config.max_skipped_fraction * found or not samples:
        raise DataError(
            f"source={config.source}: {len(reasons)} of {found} pictures cannot be read, more than "
            f"max_skipped_fraction={config.max_skipped_fraction}; the first: "
            f"{reasons[0] if reasons else 'there is none'}"
        )


def _check_keys(folder: Path, shards: list[ShardEntry]) -> None:
    """Over all parts: those of remote tars could not be compared before."""
    hashes = [Offsets.read(offsets_path(folder / entry.file), entry).key_hash for entry in shards]
    if (repeated := first_repeated(np.concatenate(hashes))) is not None:
        files = [
            entry.file
            for entry, mine in zip(shards, hashes, strict=True)
            if (mine == repeated).any()
        ]
        raise DataError(
            f"{folder}: a key is there twice, in {' and '.join(files)}, wanted unique keys: rename "
            "it in the source"
        )
