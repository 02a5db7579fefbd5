"""Indexes of imaginary data sets, and edits of real index.json files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from lpl_pretrain.config.data_mixture import DataFolders, merge
from lpl_pretrain.config.dataset import (
    INDEX_NAME,
    SINCE_VERSION_3,
    BucketEntry,
    DatasetIndex,
    ShardEntry,
    digest_of,
    sealed,
)
from tests.support.configs import dataset_index


def rewrite_index(folder: Path, change: Callable[[dict], None]) -> None:
    """Change fields of a folder's index.json and recompute its fingerprints and digest."""
    path = Path(folder) / INDEX_NAME
    fields = json.loads(path.read_text())
    before = [fields[name] for name in ("fingerprint", "shards_fingerprint")]
    change(fields)
    if [fields.get(name) for name in ("fingerprint", "shards_fingerprint")] == before:
        try:
            fields = sealed(DatasetIndex.model_validate(fields)).model_dump(mode="json")
        except ValueError:  # not even the fields of an index
            fields["digest"] = digest_of(fields)
    else:
        fields["digest"] = digest_of(fields)
    path.write_text(json.dumps(fields))


def as_format_2(folder: Path) -> None:
    """Rewrite a folder's index.json in format 2, which had no digests."""
    path = Path(folder) / INDEX_NAME
    fields = json.loads(path.read_text())
    fields |= {"format_version": 2, "fingerprint": fields["shards_fingerprint"]}
    path.write_text(
        json.dumps({name: value for name, value in fields.items() if name not in SINCE_VERSION_3})
    )


def simulated_index(
    name: str, buckets: dict[tuple[int, int], list[int]], bytes_each: int = 1000
) -> DatasetIndex:
    """Index with given shards; `buckets` maps (height, width) to the sizes of its shards."""
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
    entries = [
        BucketEntry(height=h, width=w, samples=sum(sizes)) for (h, w), sizes in buckets.items()
    ]
    index = dataset_index(
        side=max(max(shape) for shape in buckets), samples=sum(entry.samples for entry in shards)
    )
    height, width = next(iter(buckets))
    fingerprint = hashlib.sha256(name.encode()).hexdigest()
    return index.model_copy(
        update={
            "shards": shards,
            "buckets": entries,
            "latent": index.latent.model_copy(update={"height": height, "width": width}),
            "fingerprint": fingerprint,
            "shards_fingerprint": fingerprint,
        }
    )


def simulated_folders(weights: dict[str, float], indexes: dict[str, DatasetIndex]) -> DataFolders:
    total = sum(Fraction(repr(weight)) for weight in weights.values())
    fractions = [Fraction(repr(weight)) / total for weight in weights.values()]
    names = list(weights)
    ordered = [indexes[name] for name in names]
    return DataFolders(names, fractions, ordered, merge(names, fractions, ordered))
