"""Extracts the features of real images once, and keeps them as a reference file.

The file of a run is evaluations/reference_<key>.safetensors; <key> is a hash of the extractors, the
resolution, and the source files' names, sizes and times, which costs no reading.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from lpl_pretrain.config.metrics import image_metrics
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.encoding.resize_crop import to_square
from lpl_pretrain.encoding.source_image import SourceImage
from lpl_pretrain.encoding.sources import list_images
from lpl_pretrain.evaluation.agree import run_and_agree
from lpl_pretrain.evaluation.checksummed_tensors import save_tensors
from lpl_pretrain.evaluation.extractor import Extractor
from lpl_pretrain.evaluation.feature_store import FeatureStore
from lpl_pretrain.evaluation.image_files import write_grid
from lpl_pretrain.evaluation.reference import (
    COMPARED,
    Reference,
    check_provenance,
    read_npz,
    read_reference,
)
from lpl_pretrain.runtime.dist import barrier, broadcast_json
from lpl_pretrain.runtime.lease import Lease
from lpl_pretrain.runtime.log import progress
from lpl_pretrain.runtime.world import World

POLL_S = 1.0
"""Seconds between looks at a reference that another evaluator is building."""
KEY_LENGTH = 16
SHA256 = "sha256"


def open_reference(
    run_dir: RunDir,
    protocol: EvaluateConfig,
    resolution_px: int,
    extractors: list[Extractor],
    world: World,
) -> Reference:
    """Collective.  Reads `protocol.reference`: a file, or images, whose features it extracts.

    Raises ConfigError, and DataError for a file that cannot be read.
    """
    source = protocol.reference
    if isinstance(source, str) and source.endswith(".npz"):
        return read_npz(Path(source), protocol, extractors)
    if isinstance(source, str) and source.endswith(".safetensors"):
        reference = read_reference(Path(source))
        check_provenance(source, reference, protocol, resolution_px, extractors)
        return reference
    images = list(list_images(source))
    key = reference_key(images, protocol, resolution_px, extractors)
    path = run_dir.path / "evaluations" / f"reference_{key}.safetensors"
    while not broadcast_json(path.is_file()):
        lease = Lease(path.with_suffix(".lease"))
        run_and_agree(lease.take, act=world.rank == 0)
        with lease if world.rank == 0 else nullcontext():
            if broadcast_json(lease.held):
                build_reference(path, images, protocol, resolution_px, extractors, world)
                break
        time.sleep(POLL_S)  # another evaluator is building it
    reference = read_reference(path)
    check_provenance(str(path), reference, protocol, resolution_px, extractors)
    return reference


def build_reference(
    path: Path,
    images: list[SourceImage],
    protocol: EvaluateConfig,
    resolution_px: int,
    extractors: list[Extractor],
    world: World,
) -> None:
    """Collective.  Extracts features of all images, resized to `resolution_px` as by `encode`."""
    store = FeatureStore(path.with_suffix(".partial"), len(images), protocol.batch_size)
    with progress(len(images), "img", "reference") as bar:
        for batch in store.missing(world.rank, world.world_size):
            pixels = torch.stack([_pixels(images[i], resolution_px) for i in batch])
            features = {
                f"{extractor.config.label}/{kind}": rows
                for extractor in extractors
                for kind, rows in extractor(pixels).items()
                if kind in COMPARED
            }
            digests = [list(bytes.fromhex(images[i].sha256())) for i in batch]
            store.put(batch, {**features, SHA256: torch.tensor(digests, dtype=torch.uint8)})
            bar.update(len(batch))
    barrier()
    if world.rank == 0:
        write_reference(path, store, images, protocol, resolution_px, extractors)
        store.remove()
    barrier()


def write_reference(
    path: Path,
    store: FeatureStore,
    images: list[SourceImage],
    protocol: EvaluateConfig,
    resolution_px: int,
    extractors: list[Extractor],
) -> None:
    """Write the reference file, and a grid of real images beside it."""
    single = []
    if image_metrics(protocol.metrics):
        single = evenly_spaced(len(images), protocol.reference_features)
    tensors: dict[str, Tensor] = {}
    for extractor in extractors:
        tensors |= _tensors_of(store, extractor.config.label, single)
    grid = path.with_suffix(".png")
    shown = evenly_spaced(len(images), protocol.grid_images)
    if shown:
        write_grid(grid, torch.stack([_pixels(images[i], resolution_px) for i in shown]))
    provenance = {
        "pictures": len(images),
        "compared_one_by_one": len(single),
        "fingerprint": _fingerprint(images, store),
        "source": protocol.reference,
        "resolution_px": resolution_px,
        "extractors": {extractor.config.label: extractor.identity() for extractor in extractors},
        "grid": grid.name if shown else None,
    }
    save_tensors(path, tensors, {"facts": json.dumps(provenance)})


def _tensors_of(store: FeatureStore, label: str, single: list[int]) -> dict[str, Tensor]:
    """Tensors of one extractor; `single`: indices of images whose own features are kept."""
    tensors: dict[str, Tensor] = {}
    for kind in COMPARED:
        if next(store.rows(f"{label}/{kind}"), None) is not None:
            statistics = store.statistics(f"{label}/{kind}").tensors()
            tensors |= {f"{label}/{kind}/{name}": tensor for name, tensor in statistics.items()}
    if single:
        tensors[f"{label}/features"] = store.read_all(f"{label}/pooled")[single].contiguous()
    return tensors


def _fingerprint(images: list[SourceImage], store: FeatureStore) -> str:
    """sha256 over the key and the sha256 of every image, in order."""
    fingerprint = hashlib.sha256()
    digests = (row for rows in store.rows(SHA256) for row in rows)
    for image, digest in zip(images, digests, strict=True):
        fingerprint.update(f"{image.key} {bytes(digest.tolist()).hex()}\n".encode())
    return fingerprint.hexdigest()


def reference_key(
    images: list[SourceImage],
    protocol: EvaluateConfig,
    resolution_px: int,
    extractors: list[Extractor],
) -> str:
    """Hash of everything that a run's own reference depends on; reads no image."""
    files = {Path(image.path) for image in images}
    stamps = sorted((path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files)
    single = protocol.reference_features if image_metrics(protocol.metrics) else 0
    key = [
        stamps,
        len(images),
        resolution_px,
        [extractor.identity() for extractor in extractors],
        protocol.grid_images,
        single,
    ]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:KEY_LENGTH]


def evenly_spaced(total: int, count: int) -> list[int]:
    """Pick at most `count` indices of 0 ... total - 1, spread over all of them.

    Neighbours in a source are often alike.
    """
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _pixels(image: SourceImage, resolution_px: int) -> Tensor:
    """uint8 (3, resolution_px, resolution_px)."""
    return torch.tensor(to_square(image.load(), resolution_px)).permute(2, 0, 1)
