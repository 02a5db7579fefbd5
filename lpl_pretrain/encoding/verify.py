"""Compares a finished folder with its index and its source: reads every byte, decodes some latents
and compares them with their images.
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
from lpl_pretrain.encoding.encoders import Autoencoder, Encoders, TextEncoder
from lpl_pretrain.encoding.index import null_text_arrays, text_entry
from lpl_pretrain.encoding.part_encoder import DecodedImage, decode
from lpl_pretrain.encoding.plan import Part, Plan, content_settings, make_plan
from lpl_pretrain.encoding.shard_checks import Check, check_shards, moments_as_floats, open_shard
from lpl_pretrain.encoding.source_image import SourceImage
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.atomic import scratch_folder

MAX_PSNR_LOSS_DB = 1.0
"""A stored latent may decode this much worse than a newly encoded one: it was rounded, and maybe
encoded on other hardware.
"""
MAX_SHARDS = 8
"""Shards whose samples are compared with their images."""
NULL_TEXT_TOLERANCE = 0.02
"""Fraction of the largest absolute value, for int8 and for other hardware."""


class DecodingAutoencoder(Autoencoder, Protocol):
    """An autoencoder whose decoder is loaded too."""

    def decode(self, raw: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Report:
    """Result of `verify`."""

    folder: str
    checks: list[Check]

    @property
    def is_sound(self) -> bool:
        return not any(check.problems for check in self.checks)

    def table(self) -> str:
        """One line per check, with its first problems."""
        width = max(len(check.name) for check in self.checks)
        lines = [f"{self.folder}: {'sound' if self.is_sound else 'NOT SOUND'}"]
        for check in self.checks:
            verdict = "BAD" if check.problems else "ok "
            lines.append(f"  {check.name:<{width}}  {verdict}  {check.scope}")
            lines += [f"  {'':<{width}}       {problem}" for problem in check.problems[:10]]
            if len(check.problems) > 10:
                lines.append(f"  {'':<{width}}       ... and {len(check.problems) - 10} more")
        return "\n".join(lines)


def verify(
    config: EncodeConfig,
    images: int = 32,
    autoencoder: DecodingAutoencoder | None = None,
    text_encoders: dict[str, TextEncoder] | None = None,
) -> Report:
    """Compares config.output with config.source; decodes `images` samples of the folder."""
    try:
        index = read_index(config.output)
    except DataError as error:
        return Report(config.output, [Check("index", INDEX_NAME, [str(error)])])
    encoders = Encoders.load(config, autoencoder, text_encoders)
    checks = check_shards(Path(config.output), index)
    checks.append(_check_null_text(config, index, encoders))
    try:
        plan = make_plan(config, encoders.identities())
    except DataError as error:
        return Report(
            config.output,
            [*checks, Check("source and encoders", "as they are now", [str(error)])],
        )
    problems = _check_settings(config, index, encoders, plan)
    if index.plan not in (plan.identity, plan.earlier_identity):
        problems.insert(0, "source, encoders or configuration are not those of this folder")
    checks.append(Check("source and encoders", f"{len(plan.parts)} parts", problems))
    if not any(check.problems for check in checks):
        checks.append(_check_images(config, index, encoders, plan, images))
    return Report(config.output, checks)


def _check_settings(
    config: EncodeConfig, index: DatasetIndex, encoders: Encoders, plan: Plan
) -> list[str]:
    """Fields of the index that differ from the configuration, the encoders and the source."""
    autoencoder = encoders.autoencoder
    stored = {name: value for name, value in json.loads(index.config).items() if name != "pixels"}
    current = {name: value for name, value in content_settings(config).items() if name != "pixels"}
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
        "text": (index.text, {name: text_entry(config, encoders, name) for name in encoders.text}),
        "config": (stored, current),
    }
    if plan.classes is not None and not index.skipped:
        compared["classes"] = (index.classes, plan.classes)
    return [
        f"{name}: index.json says {recorded}, wanted {wanted}"
        for name, (recorded, wanted) in compared.items()
        if recorded != wanted
    ]


@torch.inference_mode()
def _check_null_text(config: EncodeConfig, index: DatasetIndex, encoders: Encoders) -> Check:
    """Compares the stored null texts with the encoders' outputs."""
    problems = []
    for name in index.text.keys() & encoders.text.keys():
        try:
            stored = read_null_text(config.output, index, [name])[name]
        except DataError as error:
            problems.append(str(error))
            continue
        for field, wanted in null_text_arrays(encoders, name).items():
            actual = stored[field].numpy()
            tolerance = NULL_TEXT_TOLERANCE * np.abs(wanted).max()
            if actual.shape != wanted.shape or np.abs(actual - wanted).max() > tolerance:
                problems.append(
                    f"text_{name}: its {field} differ from the encoder's output for the empty "
                    "caption: encode the folder again"
                )
    return Check("empty captions", f"{len(index.text)} encoders", problems)


@torch.inference_mode()
def _check_images(
    config: EncodeConfig, index: DatasetIndex, encoders: Encoders, plan: Plan, num_images: int
) -> Check:
    """Decodes stored latents and compares them with their images, as well as newly encoded ones."""
    problems: list[str] = []
    stored_db: list[float] = []
    new_db: list[float] = []
    with scratch_folder("lpl-verify") as scratch:
        for shard, row, decoded in _select_samples(config, index, plan, num_images, scratch):
            where = shard.where(row)
            origin = decoded.image.origin
            resize_crop = decoded.resize_crop
            sizes = [*decoded.source_px, *resize_crop.resized_px, *resize_crop.crop_px]
            if shard.offsets.micro[row].tolist() != sizes:
                problems.append(f"{where}: its recorded sizes are not those of {origin}")
                continue
            stored = moments_as_floats(shard, index, row, False)
            new = encoders.encode_moments(decoded.pixels[None], config).floats[0]
            stored_db.append(_psnr(encoders, stored, decoded.pixels))
            new_db.append(_psnr(encoders, new, decoded.pixels))
            if stored_db[-1] < new_db[-1] - MAX_PSNR_LOSS_DB:
                problems.append(
                    f"{where}: decodes at {stored_db[-1]:.1f} dB, {origin} newly encoded at "
                    f"{new_db[-1]:.1f} dB: the latent belongs to another image"
                )
    if not stored_db:
        return Check("images", "none could be compared", problems)
    means = (
        f"PSNR {np.mean(stored_db):.2f} dB (lowest {min(stored_db):.2f}); newly encoded "
        f"{np.mean(new_db):.2f} dB"
    )
    return Check("images", f"{len(stored_db)} decoded: {means}", problems)


def _select_samples(
    config: EncodeConfig, index: DatasetIndex, plan: Plan, num_images: int, scratch: Path
) -> Iterator[tuple[OpenShard, int, DecodedImage]]:
    """(shard, row, image) of samples spread over a few shards.  The name of a shard contains that
    of its part.
    """
    parts = {part.name: part for part in plan.parts}
    num_shards = min(MAX_SHARDS, len(index.shards), max(1, num_images))
    shards = [
        open_shard(Path(config.output), index.shards[i * len(index.shards) // num_shards], index)
        for i in range(num_shards)
    ]
    per_shard = -(-num_images // num_shards)
    for part_name, group in groupby(
        shards, key=lambda shard: shard.entry.file.removeprefix("latents-")[:10]
    ):
        selected: dict[str, tuple[OpenShard, int]] = {}
        for shard in group:
            total = len(shard.offsets)
            rows = set(range(total))
            if total > per_shard:
                rows = {i * total // per_shard for i in range(per_shard)}
            for row in sorted(rows):
                selected[key_at(shard.path, shard.offsets, row)] = (shard, row)
        if part_name not in parts:
            continue
        for image in _part_images(parts[part_name], scratch):
            if image.key in selected:
                shard, row = selected[image.key]
                yield shard, row, decode(image, config)


def _part_images(part: Part, scratch: Path) -> Iterator[SourceImage]:
    """The readable images of a part; downloads a remote tar to `scratch`."""
    for image in part.images(lambda url: download(url, scratch / part.name)):
        if isinstance(image, SourceImage):
            yield image


def _psnr(encoders: Encoders, moments: np.ndarray, pixels: np.ndarray) -> float:
    """PSNR, in dB, of the decoded posterior mean against uint8 pixels."""
    raw = torch.from_numpy(moments[: len(moments) // 2])[None].to(encoders.device)
    decoded = encoders.autoencoder.decode(raw)[0].float().cpu().clamp(-1, 1)  # type: ignore[attr-defined]
    image = torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1
    return float(10 * torch.log10(4 / (decoded - image).square().mean().clamp_min(1e-12)))
