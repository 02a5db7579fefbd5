"""Summarises a data folder: counts, classes, buckets, statistics, disk use, and a contact sheet."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lpl_pretrain.config.dataset import FORMAT_VERSION, DatasetIndex, read_index
from lpl_pretrain.config.paths import is_url
from lpl_pretrain.config.schema import DataConfig
from lpl_pretrain.data.stream import LatentStream
from lpl_pretrain.encoding.verify import DecodingAutoencoder
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.atomic import atomic_write

CLASSES_SHOWN = 12
BATCH = 8
GAP_PX = 2


def describe(folder: str) -> str:
    """Summary of a folder, one line per property.  Raises DataError if it is no data set."""
    index = read_index(folder)
    total_bytes = sum(entry.bytes for entry in index.shards)
    autoencoder = index.autoencoder
    skipped = f", {index.skipped} images were skipped" if index.skipped else ""
    properties = {
        "samples": f"{index.samples:,} in {len(index.shards)} shards{skipped}",
        "disk": f"{total_bytes / 2**20:,.1f} MiB, {_per_sample(index, total_bytes)}",
        "classes": _classes(index),
        "captions": f"{index.captions:,}" + "".join(f"; {line}" for line in _text(index)),
        "buckets": _buckets(index),
        "latents": f"{index.latent.channels} channels, {index.moments_dtype}"
        + (", mirrored ones too" if index.flipped else ""),
        "mean, std": "  ".join(
            f"{m:+.3f} {s:.3f}" for m, s in zip(index.latent.mean, index.latent.std, strict=True)
        ),
        "autoencoder": f"{_printable(autoencoder.name)} ({autoencoder.identity[:12]}), "
        f"1/{autoencoder.downscale} of the side",
        "fingerprint": index.fingerprint[:12],
        "format": str(index.format_version),
    }
    if index.format_version < FORMAT_VERSION:
        properties["format"] += (
            ", without checksums of its index and null texts: `lpl-pretrain data seal` adds them"
        )
    width = max(map(len, properties))
    lines = [f"  {name:<{width}}  {value}" for name, value in properties.items()]
    return "\n".join([folder, *lines])


@torch.inference_mode()
def contact_sheet(
    folder: str,
    autoencoder: DecodingAutoencoder,
    output: Path,
    images: int = 64,
    side_px: int = 128,
) -> None:
    """Writes a PNG of images decoded from latents, in the order in which a run with seed 0 reads
    them.

    Raises DataError for another autoencoder than the one that encoded the folder.
    """
    index = read_index(folder)
    if autoencoder.identity != index.autoencoder.identity:
        raise DataError(
            f"{folder}: was encoded by autoencoder {index.autoencoder.identity[:12]} "
            f"({index.autoencoder.name}), given is {autoencoder.identity[:12]}: name that one with "
            "--autoencoder"
        )
    # few lanes read few remote shards
    order = {"lanes": 2, "shuffle_block_samples": 256} if is_url(folder) else {}
    stream = LatentStream(DataConfig.model_validate({"folder": folder} | order), 0, BATCH)
    thumbnails: list[Image.Image] = []
    for start in range(0, images, BATCH):
        moments = stream.read(range(start, min(start + BATCH, images))).to("cpu").moments
        means = moments.chunk(2, dim=1)[0]
        thumbnails += [_thumbnail(decoded, side_px) for decoded in autoencoder.decode(means)]
    stream.close()
    columns = max(1, round(images**0.5))
    rows = -(-images // columns)
    cell = side_px + GAP_PX
    sheet = Image.new("RGB", (columns * cell - GAP_PX, rows * cell - GAP_PX), "white")
    for i, thumbnail in enumerate(thumbnails):
        left = (i % columns) * cell + (side_px - thumbnail.width) // 2
        top = (i // columns) * cell + (side_px - thumbnail.height) // 2
        sheet.paste(thumbnail, (left, top))
    with atomic_write(output) as temporary:
        sheet.save(temporary, "PNG")


def _thumbnail(decoded: Tensor, side_px: int) -> Image.Image:
    """Image of (3, H_px, W_px) in [-1, 1], resized so that its longer side is `side_px`."""
    levels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    image = Image.fromarray(levels.permute(1, 2, 0).numpy())
    scale = side_px / max(image.size)
    return image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
    )


def _per_sample(index: DatasetIndex, total_bytes: int) -> str:
    position_bytes = 2 * 2 * index.latent.channels * (1 + index.flipped)
    latents = sum(
        position_bytes * bucket.height * bucket.width * bucket.samples for bucket in index.buckets
    )
    return (
        f"{total_bytes / index.samples / 2**10:.1f} KiB a sample; latents are "
        f"{100 * latents / total_bytes:.0f} % of it"
    )


def _classes(index: DatasetIndex) -> str:
    if not index.classes:
        return "none"
    ordered = sorted(
        zip(index.class_counts, index.classes, strict=True), key=lambda pair: (-pair[0], pair[1])
    )
    shown = ", ".join(f"{_printable(name)} {count:,}" for count, name in ordered[:CLASSES_SHOWN])
    return f"{len(index.classes)}: {shown}" + (
        f", ... down to {ordered[-1][0]:,}" if len(ordered) > CLASSES_SHOWN else ""
    )


def _printable(text: str) -> str:
    """Escapes control characters, which a terminal would interpret."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _text(index: DatasetIndex) -> list[str]:
    return [
        f"{name}: up to {entry.max_tokens} x {entry.width} in {entry.storage}"
        + (f" and {entry.pooled_width} pooled" if entry.pooled_width else "")
        for name, entry in index.text.items()
    ]


def _buckets(index: DatasetIndex) -> str:
    downscale = index.autoencoder.downscale
    return ", ".join(
        f"{bucket.height * downscale}x{bucket.width * downscale} px "
        f"({bucket.height}x{bucket.width}) {bucket.samples:,}"
        for bucket in index.buckets
    )
