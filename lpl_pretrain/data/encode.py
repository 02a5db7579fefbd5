"""Pictures to latents: which pictures are encoded, in which order, and when a finished folder stands as it is.

Decoding runs ahead on threads while the autoencoder works.  Images are float (B, 3, H_px, W_px) in [-1, 1]; moments are
stored in float16.  The .json of a sample says `image_sha256`, `source_px` (height, width) and `class_name`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lpl_pretrain.config.dataset import INDEX_NAME, AutoencoderEntry, DatasetIndex, read_index
from lpl_pretrain.config.schema import EncodeConfig
from lpl_pretrain.data.ahead import map_ahead
from lpl_pretrain.data.classes import Survey, survey
from lpl_pretrain.data.images import Picture, decode_picture, read_pictures, to_square
from lpl_pretrain.data.writer import ShardWriter
from lpl_pretrain.errors import ConfigError, DataError
from lpl_pretrain.runtime.log import log, progress

DECODE_THREADS = min(16, os.cpu_count() or 1)


class Encoder(Protocol):
    """What is asked of an autoencoder here (models/autoencoder.py)."""

    identity: str
    downscale: int
    latent_channels: int
    shift: float
    scale: float

    def to(self, device: torch.device) -> Encoder: ...
    def encode_moments(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Decoded:
    picture: Picture
    image_sha256: str
    source_px: tuple[int, int]  # height, width
    pixels: np.ndarray  # uint8 (resolution_px, resolution_px, 3)


def encode(config: EncodeConfig, autoencoder: Encoder | None = None) -> DatasetIndex:
    """Writes config.output, or leaves it alone when it was made from the same inputs.  Raises ConfigError, DataError."""
    if autoencoder is None:
        from lpl_pretrain.models.autoencoder import load_autoencoder  # imports diffusers: seconds that a given one need not pay

        autoencoder = load_autoencoder(config.autoencoder)
    if config.resolution_px % autoencoder.downscale:
        above = -(-config.resolution_px // autoencoder.downscale) * autoencoder.downscale
        raise ConfigError(
            f"resolution_px={config.resolution_px} is not a multiple of {autoencoder.downscale}, the pixels per "
            f"latent position of autoencoder={config.autoencoder}: choose one that is, such as {above}"
        )
    found = survey(read_pictures(config.source))
    if (Path(config.output) / INDEX_NAME).exists():
        return _accept_finished(config, autoencoder, found)
    return _encode_all(config, autoencoder, found)


def _accept_finished(config: EncodeConfig, autoencoder: Encoder, found: Survey) -> DatasetIndex:
    index = read_index(config.output)
    pairs = {
        "autoencoder identity": (index.autoencoder.identity, autoencoder.identity),
        "resolution_px": (index.resolution_px, config.resolution_px),
    }
    if all(old == new for old, new in pairs.values()):
        entries = map_ahead(
            lambda picture: _source_entry(picture, picture.sha256()),
            read_pictures(config.source),
            threads=DECODE_THREADS,
            ahead=4 * DECODE_THREADS,
        )
        pairs["source fingerprint"] = (index.source_fingerprint, _source_fingerprint(entries))
    if differing := [f"{name} {old} there, {new} now" for name, (old, new) in pairs.items() if old != new]:
        raise DataError(
            f"output={config.output}: holds a data set made from other inputs ({'; '.join(differing)}): "
            "name another output, or remove that folder"
        )
    log.info("%s: encoded already from these %d pictures; left alone", config.output, found.samples)
    return index


def _encode_all(config: EncodeConfig, autoencoder: Encoder, found: Survey) -> DatasetIndex:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = autoencoder.to(device)
    decoded = map_ahead(
        lambda picture: _decode(picture, config.resolution_px),
        read_pictures(config.source),
        threads=DECODE_THREADS,
        ahead=4 * config.batch_size,
    )
    entries: list[str] = []
    writer = ShardWriter(Path(config.output), int(config.shard_max_mib * 2**20))
    with closing(decoded), progress(found.samples, " pictures", "encode") as bar:
        for batch in _in_batches(decoded, config.batch_size):
            for item, moments in zip(batch, _encode_batch(batch, autoencoder, device, config.precision), strict=True):
                facts = {"class_name": item.picture.class_name, "image_sha256": item.image_sha256, "source_px": item.source_px}
                writer.add(item.picture.key, moments, item.picture.label, item.picture.caption, facts)
                entries.append(_source_entry(item.picture, item.image_sha256))
            bar.update(len(batch))
    made_by = AutoencoderEntry(
        identity=autoencoder.identity, downscale=autoencoder.downscale, shift=autoencoder.shift, scale=autoencoder.scale
    )
    return writer.finish(made_by, config.resolution_px, found.classes, _source_fingerprint(entries))


def _decode(picture: Picture, resolution_px: int) -> _Decoded:
    encoded = picture.read_bytes()
    pixels = decode_picture(encoded, picture.origin)
    return _Decoded(picture, hashlib.sha256(encoded).hexdigest(), pixels.shape[:2], to_square(pixels, resolution_px))


@torch.inference_mode()
def _encode_batch(batch: list[_Decoded], autoencoder: Encoder, device: torch.device, precision: str) -> Iterable[np.ndarray]:
    """float16 (2C, H, W) per picture.  Raises DataError for what float16 cannot hold."""
    pixels = torch.from_numpy(np.stack([item.pixels for item in batch])).to(device)
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        moments = autoencoder.encode_moments(images).float()
    side = images.shape[-1] // autoencoder.downscale
    assert moments.shape == (len(batch), 2 * autoencoder.latent_channels, side, side), moments.shape
    half = moments.half()
    if not torch.isfinite(half).all():
        row = int((~torch.isfinite(half)).flatten(1).any(1).nonzero()[0])
        picture, largest = batch[row].picture, moments[row].abs().max().item()
        raise DataError(
            f"{picture.origin}: sample {picture.key!r}: its moments reach {largest:g}, wanted finite values up to "
            "65504 (float16): remove the picture, or set precision=fp32"
        )
    return half.cpu().numpy()


def _in_batches(items: Iterator[_Decoded], size: int) -> Iterator[list[_Decoded]]:
    while batch := list(islice(items, size)):
        yield batch


def _source_entry(picture: Picture, image_sha256: str) -> str:
    return json.dumps([picture.key, image_sha256, picture.label, picture.class_name, picture.caption])


def _source_fingerprint(entries: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()
