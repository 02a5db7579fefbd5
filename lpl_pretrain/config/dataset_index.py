"""The fields of a data folder's `index.json`, and the digests over them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Literal, Optional

from lpl_pretrain.config.base import Section
from lpl_pretrain.config.strict_json import canonical_sha256

FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)
SINCE_VERSION_3 = ("digest", "null_text", "shards_fingerprint")
"""Fields that format 2 does not have."""
MAX_CLASSES = 100_000


class FileEntry(Section):
    bytes: int
    sha256: str


class ShardEntry(Section):
    file: str
    bucket: int
    """Number in `buckets`: all samples of a shard have the same shape."""
    samples: int
    bytes: int
    sha256: str
    offsets_sha256: str
    """sha256 of the file beside it with the offsets of the tar's members (data/offsets.py)."""


class AutoencoderEntry(Section):
    name: str = ""
    """Path in the configuration of `encode`."""
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
    """Side of the latents that a run generates, in latent positions: of the square bucket, or else
    of the one with the most samples.
    """
    width: int
    mean: list[float]
    """Per channel, over all samples and positions of the posterior's mean."""
    std: list[float]
    """Per channel, of a draw from the posterior: square root of variance of means + mean of
    variances.
    """


class BucketEntry(Section):
    height: int
    """Height in latent positions, as `width`."""
    width: int
    samples: int


class TextEntry(Section):
    """Embeddings by one text encoder, stored beside every latent."""

    identity: str
    """sha256 over the encoder's folder (config/hashing.py)."""
    width: int
    max_tokens: int
    pooled_width: Optional[int]
    """None: only the tokens' states are stored."""
    storage: Literal["fp16", "int8"]


class DatasetIndex(Section):
    format_version: int
    digest: str = ""
    """sha256 over all other fields (`digest_of`); absent in format 2."""
    samples: int
    skipped: int = 0
    """Pictures that could not be read and were left out, because the configuration said `on_error:
    skip`.
    """
    classes: list[str]
    """Name of class i; empty when the pictures have no classes."""
    class_counts: list[int]
    captions: int = 0
    """Samples that have one."""
    text: dict[str, TextEntry] = {}
    null_text: dict[str, FileEntry] = {}
    """Text encoder -> file of its embedding of the null text; absent in format 2."""
    latent: LatentEntry
    buckets: list[BucketEntry]
    moments_dtype: Literal["fp16", "bf16"] = "fp16"
    flipped: bool = False
    """The mirrored picture's latent lies beside each one."""
    autoencoder: AutoencoderEntry
    resolution_px: int
    plan: str = ""
    """Hash of what was encoded and how, as far as the source's listing and last bytes tell
    (encoding/plan.py).
    """
    config: str = "{}"
    """The configuration of `encode`, JSON; for people, and for messages."""
    source_fingerprint: str
    """Sum modulo 2^256 of the sha256 of each picture's (key, sha256 of its bytes, class id, class
    name, caption).
    """
    fingerprint: str
    """Identity of this data set (`fingerprint_of`): of its shards, statistics, classes, shapes,
    encoders and embeddings.

    In format 2, and in folders that `data seal` brought from there to format 3: equal to
    `shards_fingerprint`.
    """
    shards_fingerprint: str = ""
    """sha256 over the shards' sha256, in order; absent in format 2."""
    shards: list[ShardEntry]

    @property
    def order_key(self) -> str:
        """Seed material of the order of samples: the shards' content, in every format."""
        return self.shards_fingerprint or self.fingerprint


def shards_fingerprint_of(shards: Iterable[ShardEntry]) -> str:
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()


def contents_of(index: DatasetIndex) -> dict[str, str]:
    """Digest of each thing that training on this data set depends on, by name.

    A checkpoint keeps these, so that a resumed run can name what has changed.
    """
    latent, autoencoder = index.latent, index.autoencoder
    values: dict[str, Any] = {
        "samples": index.samples,
        "captions": index.captions,
        "classes": index.classes,
        "class_counts": index.class_counts,
        "latent.mean": latent.mean,
        "latent.std": latent.std,
        "latent shape": [latent.channels, latent.height, latent.width],
        "buckets": [[bucket.height, bucket.width, bucket.samples] for bucket in index.buckets],
        "moments_dtype": index.moments_dtype,
        "flipped": index.flipped,
        "resolution_px": index.resolution_px,
        "autoencoder": autoencoder.model_dump(mode="json", exclude={"name"}),
        **{f"text.{name}": entry.model_dump(mode="json") for name, entry in index.text.items()},
        **{f"null_text.{name}": entry.sha256 for name, entry in index.null_text.items()},
    }
    return {
        "shards": index.order_key,
        **{name: canonical_sha256(value) for name, value in values.items()},
    }


def fingerprint_of(index: DatasetIndex) -> str:
    return canonical_sha256(contents_of(index))


def changed_contents(stored: dict[str, Any], index: DatasetIndex) -> list[str]:
    """Names of what is no longer as `stored` says: the `stream` part of a checkpoint's state.

    Checkpoints from before format 3 know the shards' fingerprint only.
    """
    before = stored.get("contents", {"shards": stored["fingerprint"]})
    now = contents_of(index)
    return [name for name, digest in before.items() if now.get(name) != digest]


def digest_of(fields: dict[str, Any]) -> str:
    """sha256 over all fields of an index but `digest`.  Raises ValueError for NaN and infinity."""
    return canonical_sha256({name: value for name, value in fields.items() if name != "digest"})
