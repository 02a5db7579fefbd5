"""The `data` section: the encoded latents of a run, their order, and how they are read."""

from __future__ import annotations

from typing import Literal, Union

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from lpl_pretrain.config.base import OnError, PathText, Section, UnexpandedPath, UnitInterval


class CacheConfig(Section):
    """Local copies of the shards of a remote folder."""

    folder: UnexpandedPath = "~/.cache/lpl_pretrain"
    """Folder of the copies, on a disk of the node."""
    max_gib: PositiveFloat = 100.0
    """Size of the copies; beyond it the least recently used shards are removed."""
    retries: NonNegativeInt = 6
    """Retries of a download that fails or is corrupt, after 1, 2, 4 ... seconds."""


class DataConfig(Section):
    """Encoded latents and how they are read."""

    folder: Union[PathText, dict[PathText, PositiveFloat]]
    """Folder of encoded latents, written by `lpl-pretrain encode`, or an fsspec URL of one; several
    are mixed as `folder: weight`.
    """
    lanes: PositiveInt = 16
    """Ranges of the data that are read interleaved, one sample of each in turn (data/lanes.py)."""
    shuffle_block_samples: PositiveInt = 1024
    """Samples that are shuffled together within a lane."""
    flips: bool = False
    """Use the mirrored image's latent for half of the samples; the folder must be encoded with
    `flips: true`.
    """
    workers: PositiveInt = 1
    """Threads that prefetch batches."""
    on_error: OnError = OnError.STOP
    """Reaction to a sample that cannot be read: stop, or skip it and train on another one."""
    max_skipped_fraction: UnitInterval = 0.001
    """Largest fraction of unreadable data that on_error skip accepts."""
    cache: CacheConfig = CacheConfig()
    """Local copies of remote shards."""
    scaling: Literal["autoencoder", "per_channel"] = "autoencoder"
    """Normalise latents by the autoencoder's shift and scaling factor, or by the folder's mean and
    std per channel.
    """
    verify: Literal["full", "sizes"] = "full"
    """Check at every start: read all shards once, divided among the ranks (checksums, shapes,
    finite values), or compare file sizes only.
    """
    posterior: Literal["sample", "mean"] = "sample"
    """Draw z0 from the stored posterior at each use of a sample, or always take its mean."""
