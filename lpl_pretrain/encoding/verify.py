"""Is a finished folder what its index and its source say?  Every byte is read; some pictures are decoded and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lpl_pretrain.config.dataset import DatasetIndex, ShardEntry, read_index
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.data.format import CAPTION, DTYPES, FLIPPED
from lpl_pretrain.data.offsets import SUFFIX, key_at
from lpl_pretrain.data.remote import download
from lpl_pretrain.data.shard import OpenShard
from lpl_pretrain.encoding.encode import Decoded, decode
from lpl_pretrain.encoding.finish import fingerprint_of
from lpl_pretrain.encoding.networks import Autoencoder, Networks, TextEncoder
from lpl_pretrain.encoding.pictures import Picture
from lpl_pretrain.encoding.plan import Part, Plan, make_plan
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.log import progress

WORSE_DB = 1.0
"""A stored latent may decode so much worse than one encoded afresh, for its rounding and for other hardware."""
SHARDS_WITH_PICTURES = 8


class DecodingAutoencoder(Autoencoder, Protocol):
    def decode(self, raw: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    looked_at: str
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    folder: str
    checks: list[Check]

    @property
    def is_sound(self) -> bool:
        return not any(check.problems for check in self.checks)

    def table(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"{self.folder}: {'sound' if self.is_sound else 'NOT SOUND'}"]
        for check in self.checks:
            lines.append(f"  {check.name:<{width}}  {'ok ' if not check.problems else 'BAD'}  {check.looked_at}")
            lines += [f"  {'':<{width}}       {problem}" for problem in check.problems[:10]]
            if len(check.problems) > 10:
                lines.append(f"  {'':<{width}}       ... and {len(check.problems) - 10} more")
        return "\n".join(lines)


def verify(
    config: EncodeConfig,
    pictures: int = 32,
    autoencoder: DecodingAutoencoder | None = None,
    text_encoders: dict[str, TextEncoder] | None = None,
) -> Report:
    """Of config.output against config.source; `pictures` are decoded, spread over the folder."""
    index = read_index(config.output)
    networks = Networks.load(config, autoencoder, text_encoders)
    checks = _check_shards(Path(config.output), index)
    try:
        plan = make_plan(config, networks.identities())
    except DataError as problem:
        return Report(config.output, [*checks, Check("source and encoders", "as they are now", [str(problem)])])
    changed = "source, encoders or configuration are not those that made this folder"
    checks.append(Check("source and encoders", f"{len(plan.parts)} parts", [changed] if plan.identity != index.plan else []))
    if not any(check.problems for check in checks):
        checks.append(_check_pictures(config, index, networks, plan, pictures))
    return Report(config.output, checks)


class _Tally:
    """What shards hold, added up one by one: no more than one of them is open."""

    def __init__(self) -> None:
        self.arrays = self.captions = 0
        self.labels: Counter[int] = Counter()
        self.per_bucket: Counter[int] = Counter()
        self.key_hashes: list[np.ndarray] = []

    def add(self, shard: OpenShard) -> None:
        self.labels.update(shard.offsets.label.tolist())
        self.per_bucket[shard.entry.bucket] += len(shard.offsets)
        self.key_hashes.append(shard.offsets.key_hash)
        if (places := shard.offsets.members.get(CAPTION)) is not None:
            self.captions += int((places[:, 1] >= 0).sum())

    def problems(self, index: DatasetIndex) -> list[str]:
        different = len(np.unique(np.concatenate(self.key_hashes))) if self.key_hashes else 0
        found = {
            "samples": (self.labels.total(), index.samples),
            "class counts": ([self.labels[c] for c in range(len(index.classes))], index.class_counts),
            "captions": (self.captions, index.captions),
            "bucket counts": (
                [self.per_bucket[b] for b in range(len(index.buckets))],
                [bucket.samples for bucket in index.buckets],
            ),
            "different keys": (different, index.samples),
        }
        return [f"{what}: {there} in the shards, index.json says {said}" for what, (there, said) in found.items() if there != said]


def _check_shards(folder: Path, index: DatasetIndex) -> list[Check]:
    tally, bytes_wrong, values_wrong = _Tally(), list[str](), list[str]()
    with progress(index.samples, " samples", "verify") as bar:
        for entry in index.shards:
            try:
                shard = _open(folder, entry, index)
                bytes_wrong += [damage.reason for damage in shard.verify()]
                tally.add(shard)
                values_wrong += _wrong_values(shard, index, tally)
            except DataError as problem:
                bytes_wrong.append(str(problem))
            bar.update(entry.samples)
    if (found := fingerprint_of(index.shards)) != index.fingerprint:
        bytes_wrong.append(f"index.json: fingerprint is {index.fingerprint}, its shards' is {found}: encode the folder again")
    counted = f"{index.samples} samples, {len(index.classes)} classes, {index.captions} captions, {len(index.buckets)} buckets"
    total_mib = sum(entry.bytes for entry in index.shards) / 2**20
    return [
        Check("checksums", f"{len(index.shards)} shards, {total_mib:.1f} MiB", bytes_wrong),
        Check("shapes and finite values", f"{tally.arrays} arrays", values_wrong),
        Check("counts", counted, tally.problems(index)),
    ]


def _open(folder: Path, entry: ShardEntry, index: DatasetIndex) -> OpenShard:
    path = folder / entry.file
    return OpenShard(path, path.with_suffix(SUFFIX), entry, index)


def _wrong_values(shard: OpenShard, index: DatasetIndex, tally: _Tally) -> list[str]:
    problems = []
    for row in range(len(shard.offsets)):
        try:
            for flipped in (False, True)[: 1 + index.flipped]:
                if not np.isfinite(_floats(shard, index, row, flipped)).all():
                    problems.append(f"{shard.where(row)}: NaN or infinity in its {FLIPPED if flipped else 'latent'}")
            shard.read_caption(row)
            for name, entry in index.text.items():
                text = shard.read_text(row, name, entry)
                if not np.isfinite(text.floats()).all() or not 0 < len(text.tokens) <= entry.max_tokens:
                    problems.append(f"{shard.where(row)}: text {name} has {len(text.tokens)} tokens, or is not finite")
            tally.arrays += 1 + index.flipped + len(index.text)
        except DataError as problem:
            problems.append(str(problem))
    return problems


@torch.inference_mode()
def _check_pictures(config: EncodeConfig, index: DatasetIndex, networks: Networks, plan: Plan, count: int) -> Check:
    problems, stored_db, fresh_db = [], [], []
    with TemporaryDirectory(prefix="lpl-verify-") as scratch:
        for shard, row, item in _find_pictures(config, index, plan, count, Path(scratch)):
            where = shard.where(row)
            if shard.offsets.micro[row].tolist() != [*item.source_px, *item.fit.resized_px, *item.fit.crop_px]:
                problems.append(f"{where}: its recorded sizes are not those of {item.picture.origin}")
                continue
            fresh = networks.moments(item.pixels[None], config).floats[0]
            stored_db.append(_psnr(networks, _floats(shard, index, row, False), item.pixels))
            fresh_db.append(_psnr(networks, fresh, item.pixels))
            if stored_db[-1] < fresh_db[-1] - WORSE_DB:
                problems.append(
                    f"{where}: decodes at {stored_db[-1]:.1f} dB, {item.picture.origin} encoded afresh at {fresh_db[-1]:.1f} dB: "
                    "the latent belongs to another picture"
                )
    if not stored_db:
        return Check("pictures", "none could be compared", problems)
    means = f"PSNR {np.mean(stored_db):.2f} dB (lowest {min(stored_db):.2f}); encoded afresh {np.mean(fresh_db):.2f} dB"
    return Check("pictures", f"{len(stored_db)} decoded: {means}", problems)


def _find_pictures(
    config: EncodeConfig, index: DatasetIndex, plan: Plan, count: int, scratch: Path
) -> Iterator[tuple[OpenShard, int, Decoded]]:
    """Samples spread over a few shards, with their pictures: a shard's name says which part of the source made it."""
    parts, total_shards = {part.name: part for part in plan.parts}, len(index.shards)
    few = min(SHARDS_WITH_PICTURES, total_shards, max(1, count))
    shards = [_open(Path(config.output), index.shards[i * total_shards // few], index) for i in range(few)]
    each = -(-count // len(shards))
    for name, group in groupby(shards, key=lambda shard: shard.entry.file.removeprefix("latents-")[:10]):
        wanted: dict[str, tuple[OpenShard, int]] = {}
        for shard in group:
            total = len(shard.offsets)
            rows = {i * total // each for i in range(each)} if total > each else set(range(total))
            wanted |= {key_at(shard.path, shard.offsets, row): (shard, row) for row in sorted(rows)}
        for picture in _pictures(parts[name], scratch):
            if picture.key in wanted:
                yield *wanted[picture.key], decode(picture, config)


def _pictures(part: Part, scratch: Path) -> Iterator[Picture]:
    for item in part.items(lambda url: download(url, scratch / part.name)):
        if isinstance(item, Picture):
            yield item


def _floats(shard: OpenShard, index: DatasetIndex, row: int, flipped: bool) -> np.ndarray:
    """(2C, H, W) float32"""
    bucket = index.buckets[shard.entry.bucket]
    stored = np.empty((2 * index.latent.channels, bucket.height, bucket.width), DTYPES[index.moments_dtype])
    shard.read_moments(row, flipped, memoryview(stored.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
    if index.moments_dtype == "fp16":
        return stored.astype(np.float32)
    return torch.from_numpy(stored.view("<i2")).view(torch.bfloat16).float().numpy()


def _psnr(networks: Networks, moments: np.ndarray, pixels: np.ndarray) -> float:
    """dB, of the posterior's mean decoded, against uint8 pixels."""
    raw = torch.from_numpy(moments[: len(moments) // 2])[None].to(networks.device)
    decoded = networks.autoencoder.decode(raw)[0].float().cpu().clamp(-1, 1)  # type: ignore[attr-defined]
    image = torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1
    return float(10 * torch.log10(4 / (decoded - image).square().mean().clamp_min(1e-12)))
