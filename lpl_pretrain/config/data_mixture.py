"""One data set of one data folder, or of several mixed by weight."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from lpl_pretrain.config.dataset import (
    MIX_CYCLE_SAMPLES,
    BucketEntry,
    DatasetIndex,
    LatentEntry,
    read_index,
)
from lpl_pretrain.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class DataFolders:
    paths: list[str]
    weights: list[Fraction]
    """Shares of the samples that training sees; they sum to 1."""
    indexes: list[DatasetIndex]
    merged: DatasetIndex
    """Index of the mixture: no shards, statistics and class counts by weight, the buckets of all
    folders.
    """


def read_data(folder: str | dict[str, float]) -> DataFolders:
    """Raises DataError or ConfigError when a folder is no data set, or when several do not fit
    together.
    """
    given = {folder: 1.0} if isinstance(folder, str) else folder
    if not given:
        raise ConfigError(
            "data.folder={}: names no folder; give one, or several with their weights"
        )
    for path, given_weight in given.items():
        if not (math.isfinite(given_weight) and given_weight > 0):
            raise ConfigError(f"data.folder.{path}={given_weight}: wanted a finite weight above 0")
    total = sum(Fraction(repr(weight)) for weight in given.values())
    weights = [Fraction(repr(weight)) / total for weight in given.values()]
    for path, weight in zip(given, weights, strict=True):
        if weight * MIX_CYCLE_SAMPLES < 1:
            raise ConfigError(
                f"data.folder.{path}: its weight is {float(weight):.2g} of the whole, wanted at "
                f"least 1/{MIX_CYCLE_SAMPLES}: raise it, or leave the folder out"
            )
    paths = list(given)
    indexes = [read_index(path) for path in paths]
    return DataFolders(paths, weights, indexes, merge(paths, weights, indexes))


def merge(paths: list[str], weights: list[Fraction], indexes: list[DatasetIndex]) -> DatasetIndex:
    if len(indexes) == 1:
        return indexes[0]
    _check_alike(paths, indexes)
    shares = [float(weight) for weight in weights]
    samples = sum(index.samples for index in indexes)
    common = [
        name
        for name, entry in indexes[0].text.items()
        if all(i.text.get(name) == entry for i in indexes)
    ]
    shapes = list(
        dict.fromkeys(
            (bucket.height, bucket.width) for index in indexes for bucket in index.buckets
        )
    )
    return indexes[0].model_copy(
        update={
            "samples": samples,
            "skipped": sum(index.skipped for index in indexes),
            "captions": sum(index.captions for index in indexes),
            "class_counts": [
                round(
                    sum(
                        share * index.class_counts[c] / index.samples
                        for share, index in zip(shares, indexes, strict=True)
                    )
                    * samples
                )
                for c in range(len(indexes[0].classes))
            ],
            "text": {name: indexes[0].text[name] for name in common},
            "null_text": {
                name: file for name, file in indexes[0].null_text.items() if name in common
            },
            "flipped": all(index.flipped for index in indexes),
            "latent": _merge_statistics(shares, indexes),
            "buckets": [
                BucketEntry(
                    height=height,
                    width=width,
                    samples=sum(_samples_of(index, height, width) for index in indexes),
                )
                for height, width in shapes
            ],
            "fingerprint": _merge_fingerprints([index.fingerprint for index in indexes], weights),
            "shards_fingerprint": _merge_fingerprints(
                [index.order_key for index in indexes], weights
            ),
            "digest": "",
            "shards": [],
        }
    )


def _merge_fingerprints(fingerprints: list[str], weights: list[Fraction]) -> str:
    lines = [f"{found} {weight}" for found, weight in zip(fingerprints, weights, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _merge_statistics(shares: list[float], indexes: list[DatasetIndex]) -> LatentEntry:
    latents = [index.latent for index in indexes]
    mean, std = [], []
    for c in range(latents[0].channels):
        mean.append(
            sum(share * latent.mean[c] for share, latent in zip(shares, latents, strict=True))
        )
        square = sum(
            share * (latent.std[c] ** 2 + latent.mean[c] ** 2)
            for share, latent in zip(shares, latents, strict=True)
        )
        variance = square - mean[c] ** 2
        if variance <= 0:  # rounding, when the means are large: at least the smallest of the parts
            variance = min(latent.std[c] for latent in latents) ** 2
        std.append(variance**0.5)
    largest = max(indexes, key=lambda index: index.samples).latent
    return largest.model_copy(update={"mean": mean, "std": std})


def _samples_of(index: DatasetIndex, height: int, width: int) -> int:
    return sum(
        bucket.samples
        for bucket in index.buckets
        if (bucket.height, bucket.width) == (height, width)
    )


def _check_alike(paths: list[str], indexes: list[DatasetIndex]) -> None:
    alike: dict[str, Callable[[DatasetIndex], Any]] = {
        "autoencoder": lambda index: index.autoencoder.identity[:12],
        "resolution_px": lambda index: index.resolution_px,
        "latent channels": lambda index: index.latent.channels,
        "moments_dtype": lambda index: index.moments_dtype,
        "classes": lambda index: index.classes,
    }
    for what, read in alike.items():
        for path, index in zip(paths[1:], indexes[1:], strict=True):
            if read(index) != read(indexes[0]):
                raise DataError(
                    f"data.folder: folders of different {what} cannot be mixed: {paths[0]} has "
                    f"{str(read(indexes[0]))[:200]}, {path} has {str(read(index))[:200]}: encode "
                    "them alike"
                )
