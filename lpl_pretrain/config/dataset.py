"""What a data folder's `index.json` says: written last by `encode`, read before anything else by everyone."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from lpl_pretrain.config.section import Section
from lpl_pretrain.errors import DataError

FORMAT_VERSION = 1
INDEX_NAME = "index.json"


class ShardEntry(Section):
    file: str
    samples: int
    bytes: int
    sha256: str


class AutoencoderEntry(Section):
    identity: str
    """sha256 over the weights and config.json (models/autoencoder.py)."""
    downscale: int
    """Pixels per latent position along one side."""
    shift: float
    scale: float
    """z0 = (raw latent - shift) * scale."""


class LatentEntry(Section):
    channels: int
    height: int
    width: int
    mean: list[float]
    """Per channel, over all samples and positions of the posterior's mean."""
    std: list[float]
    """Per channel, of a draw from the posterior: square root of variance of means + mean of variances."""


class DatasetIndex(Section):
    format_version: int
    samples: int
    classes: list[str]
    """Name of class i; empty when the pictures have no classes."""
    class_counts: list[int]
    latent: LatentEntry
    autoencoder: AutoencoderEntry
    resolution_px: int
    source_fingerprint: str
    """sha256 over the sorted (key, sha256 of the picture's bytes, class id, class name, caption)."""
    fingerprint: str
    """sha256 over the shards' sha256, in order: the identity of this data set."""
    shards: list[ShardEntry]


def read_index(folder: str | Path) -> DatasetIndex:
    """Raises DataError when the folder is no finished data set."""
    path = Path(folder) / INDEX_NAME
    if not path.is_file():
        raise DataError(f"{path}: not found; a folder without it is not a data set: run `lpl-pretrain encode` to its end")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as problem:
        raise DataError(f"{path}: not valid JSON ({problem}): encode the folder again") from None
    if raw.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version is {raw.get('format_version')!r}, this version reads {FORMAT_VERSION}: encode the folder again"
        )
    try:
        return DatasetIndex.model_validate(raw)
    except ValidationError as problem:
        raise DataError(f"{path}: does not describe a data set: {problem}") from None
