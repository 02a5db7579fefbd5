"""Indexes of data sets that do not exist, for tests of what only the index decides."""

from __future__ import annotations

import hashlib
from fractions import Fraction

from lpl_pretrain.config.dataset import BucketEntry, DatasetIndex, ShardEntry
from lpl_pretrain.config.mix import DataFolders, merge
from tests.support.configs import dataset_index


def simulated_index(name: str, buckets: dict[tuple[int, int], list[int]], bytes_each: int = 1000) -> DatasetIndex:
    """`buckets`: (height, width) -> samples of each of its shards."""
    shards = [
        ShardEntry(
            file=f"latents-{name}-{i}-{number:05d}.tar",
            bucket=i,
            samples=samples,
            bytes=samples * bytes_each,
            sha256="0" * 64,
            offsets_sha256="0" * 64,
        )
        for i, sizes in enumerate(buckets.values())
        for number, samples in enumerate(sizes)
    ]
    entries = [BucketEntry(height=h, width=w, samples=sum(sizes)) for (h, w), sizes in buckets.items()]
    return dataset_index(samples=sum(entry.samples for entry in shards)).model_copy(
        update={"shards": shards, "buckets": entries, "fingerprint": hashlib.sha256(name.encode()).hexdigest()}
    )


def simulated_folders(weights: dict[str, float], indexes: dict[str, DatasetIndex]) -> DataFolders:
    total = sum(Fraction(repr(weight)) for weight in weights.values())
    shares = [Fraction(repr(weight)) / total for weight in weights.values()]
    names, found = list(weights), [indexes[name] for name in weights]
    return DataFolders(names, shares, found, merge(names, shares, found))
