"""What a data folder's `index.json` says: written last by `encode`, read before anything else by everyone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Optional

from pydantic import ValidationError

from lpl_pretrain.config.section import Section
from lpl_pretrain.errors import DataError

FORMAT_VERSION = 2
INDEX_NAME = "index.json"
MIX_CYCLE_SAMPLES = 4096
"""Folders that are mixed by weight have their exact shares in every so many samples (data/mixture.py)."""


class ShardEntry(Section):
    file: str
    bucket: int
    """Number in `buckets`: all samples of a shard have the same shape."""
    samples: int
    bytes: int
    sha256: str
    offsets_sha256: str
    """Of the file beside it that says where in the tar everything lies (data/offsets.py)."""


class AutoencoderEntry(Section):
    name: str = ""
    """As the configuration of `encode` named it."""
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
    """Of the square bucket, or of the one with the most samples, in latent positions: what a run generates."""
    width: int
    mean: list[float]
    """Per channel, over all samples and positions of the posterior's mean."""
    std: list[float]
    """Per channel, of a draw from the posterior: square root of variance of means + mean of variances."""


class BucketEntry(Section):
    height: int
    """In latent positions."""
    width: int
    samples: int


class TextEntry(Section):
    """Embeddings by one text encoder, stored beside every latent."""

    identity: str
    """sha256 over the encoder's folder (config/identity.py)."""
    width: int
    max_tokens: int
    pooled_width: Optional[int]
    """None: only the tokens' states are stored."""
    storage: Literal["fp16", "int8"]


class DatasetIndex(Section):
    format_version: int
    samples: int
    skipped: int = 0
    """Pictures that could not be read and were left out, because the configuration said `on_error: skip`."""
    classes: list[str]
    """Name of class i; empty when the pictures have no classes."""
    class_counts: list[int]
    captions: int = 0
    """Samples that have one."""
    text: dict[str, TextEntry] = {}
    latent: LatentEntry
    buckets: list[BucketEntry]
    moments_dtype: Literal["fp16", "bf16"] = "fp16"
    flipped: bool = False
    """The mirrored picture's latent lies beside each one."""
    autoencoder: AutoencoderEntry
    resolution_px: int
    plan: str = ""
    """Hash of what was encoded and how, as far as the source's listing and last bytes tell (encoding/plan.py)."""
    config: str = "{}"
    """The configuration of `encode`, JSON; for people, and for messages."""
    source_fingerprint: str
    """Sum modulo 2^256 of the sha256 of each picture's (key, sha256 of its bytes, class id, class name, caption)."""
    fingerprint: str
    """sha256 over the shards' sha256, in order: the identity of this data set."""
    shards: list[ShardEntry]


def read_index(folder: str | Path) -> DatasetIndex:
    """Of a local folder or an fsspec URL.  Raises DataError when it is no finished data set."""
    path = f"{str(folder).rstrip('/')}/{INDEX_NAME}"
    try:
        raw = json.loads(_read_text(path))
    except json.JSONDecodeError as problem:
        raise DataError(f"{path}: not valid JSON ({problem}): encode the folder again") from None
    found = raw.get("format_version") if isinstance(raw, dict) else None
    if found != FORMAT_VERSION:
        raise DataError(f"{path}: format_version is {found!r}, this version reads {FORMAT_VERSION}: encode the folder again")
    try:
        return DatasetIndex.model_validate(raw)
    except ValidationError as problem:
        raise DataError(f"{path}: does not describe a data set: {problem}") from None


def is_url(path: str | Path) -> bool:
    """Something that fsspec opens (s3://, gs://, https://, memory:// ...), rather than a path of this machine."""
    return "://" in str(path)


def _read_text(path: str) -> str:
    missing = DataError(f"{path}: not found; a folder without it is not a data set: run `lpl-pretrain encode` to its end")
    if not is_url(path):
        if not Path(path).is_file():
            raise missing
        return Path(path).read_text()
    import fsspec  # 0.1 s that a local folder need not pay

    try:
        with fsspec.open(path, "r") as file:
            return file.read()
    except FileNotFoundError:
        raise missing from None
    except (OSError, ValueError, ImportError) as problem:
        raise DataError(f"{path}: cannot be read ({problem}): check the address, the credentials and fsspec's driver") from None
