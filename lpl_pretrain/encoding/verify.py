"""Is a finished folder what its index and its source say?  Every byte is read; some pictures are
decoded and compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lpl_pretrain.config.dataset import INDEX_NAME, DatasetIndex, read_index
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.data.null_text import read_null_text
from lpl_pretrain.data.offsets import key_at
from lpl_pretrain.data.remote import download
from lpl_pretrain.data.shard import OpenShard
from lpl_pretrain.encoding.encode import Decoded, decode
from lpl_pretrain.encoding.encoders import Autoencoder, Networks, TextEncoder
from lpl_pretrain.encoding.index import null_text_arrays, text_entry
from lpl_pretrain.encoding.pictures import Picture
from lpl_pretrain.encoding.plan import Part, Plan, make_plan, settings_of_bytes
from lpl_pretrain.encoding.shard_checks import Check, check_shards, moments_as_floats, open_shard
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.atomic import scratch_folder

WORSE_DB = 1.0
"""A stored latent may decode so much worse than one encoded afresh, for its rounding and for other
hardware.
"""
SHARDS_WITH_PICTURES = 8
NULL_TEXT_TOLERANCE = 0.02
"""Of the largest absolute value: for int8, and for other hardware."""


class DecodingAutoencoder(Autoencoder, Protocol):
    def decode(self, raw: Tensor) -> Tensor: ...


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
            lines.append(
                f"  {check.name:<{width}}  {'ok ' if not check.problems else 'BAD'}  "
                f"{check.looked_at}"
            )
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
    try:
        index = read_index(config.output)
    except DataError as problem:
        return Report(config.output, [Check("index", INDEX_NAME, [str(problem)])])
    networks = Networks.load(config, autoencoder, text_encoders)
    checks = check_shards(Path(config.output), index)
    checks.append(_check_null_text(config, index, networks))
    try:
        plan = make_plan(config, networks.identities())
    except DataError as problem:
        return Report(
            config.output,
            [*checks, Check("source and encoders", "as they are now", [str(problem)])],
        )
    problems = _check_settings(config, index, networks, plan)
    if index.plan not in (plan.identity, plan.earlier_identity):
        problems.insert(0, "source, encoders or configuration are not those that made this folder")
    checks.append(Check("source and encoders", f"{len(plan.parts)} parts", problems))
    if not any(check.problems for check in checks):
        checks.append(_check_pictures(config, index, networks, plan, pictures))
    return Report(config.output, checks)


def _check_settings(
    config: EncodeConfig, index: DatasetIndex, networks: Networks, plan: Plan
) -> list[str]:
    """What the index repeats of the configuration, the encoders and the source."""
    autoencoder = networks.autoencoder
    stored = {name: value for name, value in json.loads(index.config).items() if name != "pixels"}
    asked = {name: value for name, value in settings_of_bytes(config).items() if name != "pixels"}
    compared = {
        "autoencoder": (
            (
                index.autoencoder.identity,
                index.autoencoder.downscale,
                index.autoencoder.shift,
                index.autoencoder.scale,
            ),
            (autoencoder.identity, autoencoder.downscale, autoencoder.shift, autoencoder.scale),
        ),
        "latent.channels": (index.latent.channels, autoencoder.latent_channels),
        "resolution_px": (index.resolution_px, config.resolution_px),
        "moments_dtype": (index.moments_dtype, config.moments_dtype),
        "flipped": (index.flipped, config.flips),
        "text": (index.text, {name: text_entry(config, networks, name) for name in networks.text}),
        "config": (stored, asked),
    }
    if plan.classes is not None and not index.skipped:
        compared["classes"] = (index.classes, plan.classes)
    return [
        f"{name}: index.json says {said}, wanted {wanted}"
        for name, (said, wanted) in compared.items()
        if said != wanted
    ]


@torch.inference_mode()
def _check_null_text(config: EncodeConfig, index: DatasetIndex, networks: Networks) -> Check:
    problems = []
    for name in index.text.keys() & networks.text.keys():
        try:
            stored = read_null_text(config.output, index, [name])[name]
        except DataError as problem:
            problems.append(str(problem))
            continue
        for part, fresh in null_text_arrays(networks, name).items():
            found = stored[part].numpy()
            if (
                found.shape != fresh.shape
                or np.abs(found - fresh).max() > NULL_TEXT_TOLERANCE * np.abs(fresh).max()
            ):
                problems.append(
                    f"text_{name}: its {part} are not what the encoder makes of the empty caption: "
                    "encode the folder again"
                )
    return Check("empty captions", f"{len(index.text)} encoders", problems)


@torch.inference_mode()
def _check_pictures(
    config: EncodeConfig, index: DatasetIndex, networks: Networks, plan: Plan, count: int
) -> Check:
    problems, stored_db, fresh_db = [], [], []
    with scratch_folder("lpl-verify") as scratch:
        for shard, row, item in _find_pictures(config, index, plan, count, scratch):
            where = shard.where(row)
            if shard.offsets.micro[row].tolist() != [
                *item.source_px,
                *item.fit.resized_px,
                *item.fit.crop_px,
            ]:
                problems.append(
                    f"{where}: its recorded sizes are not those of {item.picture.origin}"
                )
                continue
            fresh = networks.moments(item.pixels[None], config).floats[0]
            stored_db.append(
                _psnr(networks, moments_as_floats(shard, index, row, False), item.pixels)
            )
            fresh_db.append(_psnr(networks, fresh, item.pixels))
            if stored_db[-1] < fresh_db[-1] - WORSE_DB:
                problems.append(
                    f"{where}: decodes at {stored_db[-1]:.1f} dB, {item.picture.origin} encoded "
                    f"afresh at {fresh_db[-1]:.1f} dB: "
                    "the latent belongs to another picture"
                )
    if not stored_db:
        return Check("pictures", "none could be compared", problems)
    means = (
        f"PSNR {np.mean(stored_db):.2f} dB (lowest {min(stored_db):.2f}); encoded afresh "
        f"{np.mean(fresh_db):.2f} dB"
    )
    return Check("pictures", f"{len(stored_db)} decoded: {means}", problems)


def _find_pictures(
    config: EncodeConfig, index: DatasetIndex, plan: Plan, count: int, scratch: Path
) -> Iterator[tuple[OpenShard, int, Decoded]]:
    """Samples spread over a few shards, with their pictures: a shard's name says which part of the
    source made it.
    """
    parts, total_shards = {part.name: part for part in plan.parts}, len(index.shards)
    few = min(SHARDS_WITH_PICTURES, total_shards, max(1, count))
    shards = [
        open_shard(Path(config.output), index.shards[i * total_shards // few], index)
        for i in range(few)
    ]
    each = -(-count // len(shards))
    for name, group in groupby(
        shards, key=lambda shard: shard.entry.file.removeprefix("latents-")[:10]
    ):
        wanted: dict[str, tuple[OpenShard, int]] = {}
        for shard in group:
            total = len(shard.offsets)
            rows = {i * total // each for i in range(each)} if total > each else set(range(total))
            wanted |= {key_at(shard.path, shard.offsets, row): (shard, row) for row in sorted(rows)}
        for picture in _pictures(parts[name], scratch) if name in parts else ():
            if picture.key in wanted:
                yield *wanted[picture.key], decode(picture, config)


def _pictures(part: Part, scratch: Path) -> Iterator[Picture]:
    for item in part.items(lambda url: download(url, scratch / part.name)):
        if isinstance(item, Picture):
            yield item


def _psnr(networks: Networks, moments: np.ndarray, pixels: np.ndarray) -> float:
    """dB, of the posterior's mean decoded, against uint8 pixels."""
    raw = torch.from_numpy(moments[: len(moments) // 2])[None].to(networks.device)
    decoded = networks.autoencoder.decode(raw)[0].float().cpu().clamp(-1, 1)  # type: ignore[attr-defined]
    image = torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1
    return float(10 * torch.log10(4 / (decoded - image).square().mean().clamp_min(1e-12)))
