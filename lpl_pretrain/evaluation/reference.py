"""Statistics of real pictures: computed once, kept beside the run's scores with everything that they depend on.

    <run>/evaluations/reference_<key>.safetensors   count, mean, scatter (stats.py)
    <run>/evaluations/reference_<key>.json          where they come from; written last
    <run>/evaluations/reference_<key>.png           some of the pictures, to look at beside samples

<key> is a hash of the extractor, the resolution, and the source files' names, sizes and times, which costs no reading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.encoding.images import to_square
from lpl_pretrain.encoding.pictures import Picture
from lpl_pretrain.encoding.sources import read_pictures
from lpl_pretrain.evaluation.features import Extractor
from lpl_pretrain.evaluation.files import publish_grid, publish_json, published
from lpl_pretrain.evaluation.stats import FeatureStatistics
from lpl_pretrain.runtime.log import progress


@dataclass(frozen=True)
class Reference:
    statistics: FeatureStatistics
    facts: dict[str, Any]
    """`pictures`, `fingerprint`, `resolution_px`, `extractor`, and the names of its files relative to the run."""


def reference_statistics(
    run_dir: RunDir, source: str | list[str], resolution_px: int, extractor: Extractor, *, batch_size: int, grid_images: int
) -> Reference:
    """Of every picture in `source`, brought to `resolution_px` as `encode` does.  Raises DataError for an unreadable picture."""
    pictures = list(read_pictures(source))
    stem = run_dir.path / "evaluations" / f"reference_{reference_key(pictures, resolution_px, extractor, grid_images)}"
    tensors, sidecar, grid = (stem.with_suffix(suffix) for suffix in (".safetensors", ".json", ".png"))
    if sidecar.is_file():
        return Reference(FeatureStatistics.from_tensors(load_file(tensors)), json.loads(sidecar.read_text()))
    statistics, fingerprint = FeatureStatistics(extractor.dimension), hashlib.sha256()
    shown, kept = set(evenly_spaced(len(pictures), grid_images)), []
    with progress(len(pictures), "img", "reference") as bar:
        for batch in _batches(pictures, batch_size):
            pixels = torch.stack([_pixels(picture, resolution_px) for picture in batch])
            kept += [row for i, row in enumerate(pixels, start=statistics.count) if i in shown]
            statistics.update(extractor(pixels))
            for picture in batch:
                fingerprint.update(f"{picture.key} {picture.sha256()}\n".encode())
            bar.update(len(batch))
    with published(tensors) as temporary:
        save_file(statistics.tensors(), temporary)
    if kept:
        publish_grid(grid, torch.stack(kept))
    facts = {
        "pictures": statistics.count,
        "fingerprint": fingerprint.hexdigest(),
        "source": source,
        "resolution_px": resolution_px,
        "extractor": extractor.identity(),
        "statistics": str(tensors.relative_to(run_dir.path)),
        "grid": str(grid.relative_to(run_dir.path)) if kept else None,
    }
    publish_json(sidecar, facts)
    return Reference(statistics, facts)


def reference_key(pictures: list[Picture], resolution_px: int, extractor: Extractor, grid_images: int) -> str:
    files = {Path(picture.path) for picture in pictures}
    stamps = sorted((path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files)
    facts = [stamps, len(pictures), resolution_px, extractor.identity(), grid_images]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most `count` of 0 ... total - 1, spread over all of them: neighbours in a source are often alike."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _batches(pictures: list[Picture], size: int) -> Iterator[list[Picture]]:
    remaining = iter(pictures)
    while batch := list(islice(remaining, size)):
        yield batch


def _pixels(picture: Picture, resolution_px: int) -> Tensor:
    return torch.tensor(to_square(picture.load(), resolution_px)).permute(2, 0, 1)
