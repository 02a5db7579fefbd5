"""What is in a data folder, for people: counts, classes, buckets, statistics, disk use, and a sheet
of its pictures.
"""

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
    """A text of one line for each fact.  Raises DataError when it is no data set."""
    index = read_index(folder)
    total_bytes, autoencoder = sum(entry.bytes for entry in index.shards), index.autoencoder
    skipped = f", {index.skipped} pictures were skipped" if index.skipped else ""
    facts = {
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
        facts["format"] += (
            ", without checksums of its index and null texts: `lpl-pretrain data seal` adds them"
        )
    width = max(map(len, facts))
    return "\n".join([folder, *(f"  {name:<{width}}  {fact}" for name, fact in facts.items())])


@torch.inference_mode()
def contact_sheet(
    folder: str,
    autoencoder: DecodingAutoencoder,
    output: Path,
    pictures: int = 64,
    side_px: int = 128,
) -> None:
    """Writes a PNG of pictures decoded from latents, in the order in which a run with seed 0 would
    meet them.

    Raises DataError for an autoencoder that did not make them.
    """
    index = read_index(folder)
    if autoencoder.identity != index.autoencoder.identity:
        raise DataError(
            f"{folder}: was encoded by autoencoder {index.autoencoder.identity[:12]} "
            f"({index.autoencoder.name}), given is "
            f"{autoencoder.identity[:12]}: name that one with --autoencoder"
        )
    few = (
        {"lanes": 2, "shuffle_block_samples": 256} if is_url(folder) else {}
    )  # looks into as few remote shards as it can
    stream = LatentStream(DataConfig.model_validate({"folder": folder} | few), 0, BATCH)
    images: list[Image.Image] = []
    for start in range(0, pictures, BATCH):
        moments = stream.read(range(start, min(start + BATCH, pictures))).to("cpu").moments
        images += [
            _image(decoded, side_px) for decoded in autoencoder.decode(moments.chunk(2, dim=1)[0])
        ]
    stream.close()
    columns = max(1, round(pictures**0.5))
    rows, cell = -(-pictures // columns), side_px + GAP_PX
    sheet = Image.new("RGB", (columns * cell - GAP_PX, rows * cell - GAP_PX), "white")
    for i, image in enumerate(images):
        left, top = (i % columns) * cell, (i // columns) * cell
        sheet.paste(
            image, (left + (side_px - image.width) // 2, top + (side_px - image.height) // 2)
        )
    with atomic_write(output) as temporary:
        sheet.save(temporary, "PNG")


def _image(decoded: Tensor, side_px: int) -> Image.Image:
    """(3, H_px, W_px) in [-1, 1]; its longer side becomes `side_px`."""
    pixels = (
        ((decoded.float().clamp(-1, 1) + 1) * 127.5)
        .round()
        .to(torch.uint8)
        .permute(1, 2, 0)
        .numpy()
    )
    image = Image.fromarray(pixels)
    scale = side_px / max(image.size)
    return image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
    )


def _per_sample(index: DatasetIndex, total_bytes: int) -> str:
    each = 2 * 2 * index.latent.channels * (1 + index.flipped)
    latents = sum(each * bucket.height * bucket.width * bucket.samples for bucket in index.buckets)
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
    """Escapes control characters, which a terminal would obey."""
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
    px = index.autoencoder.downscale
    parts = [
        f"{b.height * px}x{b.width * px} px ({b.height}x{b.width}) {b.samples:,}"
        for b in index.buckets
    ]
    return ", ".join(parts)
