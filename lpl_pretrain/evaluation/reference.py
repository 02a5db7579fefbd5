"""What generated pictures are compared with: statistics and features of real ones, computed once,
with where they come from.

One safetensors file: `<extractor>/<kind>/{count, mean, scatter}` (stats.py), `<extractor>/features`
of at most so many pictures, and in its header the facts as JSON.  A run keeps its own as
evaluations/reference_<key>.safetensors; <key> is a hash of the extractors, the resolution, and the
source files' names, sizes and times, which costs no reading.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpl_pretrain.config.protocol import OF_FEATURES, EvaluateConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.strict_json import is_count, parse_json, shown
from lpl_pretrain.encoding.images import to_square
from lpl_pretrain.encoding.pictures import Picture
from lpl_pretrain.encoding.sources import read_pictures
from lpl_pretrain.errors import ConfigError, DataError
from lpl_pretrain.evaluation.agree import run_and_agree
from lpl_pretrain.evaluation.checksummed_tensors import load_tensors, save_tensors
from lpl_pretrain.evaluation.extractor import Extractor
from lpl_pretrain.evaluation.feature_store import FeatureStore
from lpl_pretrain.evaluation.image_files import publish_grid
from lpl_pretrain.evaluation.stats import FeatureStatistics
from lpl_pretrain.runtime.dist import barrier, broadcast_json
from lpl_pretrain.runtime.lease import Lease
from lpl_pretrain.runtime.log import progress
from lpl_pretrain.runtime.world import World

POLL_S, SHA256 = 1.0, "sha256"
UNKNOWN = 2**30
"""Taken for the number of pictures less one where a file does not tell: many, so that no rank is
thought to be missing.
"""
STATISTICS = ("count", "mean", "scatter")
COMPARED = ("pooled", "spatial")
"""Kinds of features that have statistics."""


@dataclass(frozen=True)
class Reference:
    statistics: dict[str, FeatureStatistics]
    """By `<extractor>/<kind>`."""
    features: dict[str, Tensor]
    """By extractor, (N, D): pooled features of pictures that are compared one by one; empty when no
    metric does.
    """
    facts: dict[str, Any]
    """`pictures`, `fingerprint`, `resolution_px`, `extractors`, and the names of its files."""


def open_reference(
    run_dir: RunDir,
    protocol: EvaluateConfig,
    resolution_px: int,
    extractors: list[Extractor],
    world: World,
) -> Reference:
    """Collective. As `protocol.reference` says: a file, or pictures.  Raises ConfigError, and
    DataError for what cannot be read.
    """
    source = protocol.reference
    if isinstance(source, str) and source.endswith(".npz"):
        return read_npz(Path(source), protocol, extractors)
    if isinstance(source, str) and source.endswith(".safetensors"):
        found = read_reference(Path(source))
        check_provenance(source, found, protocol, resolution_px, extractors)
        return found
    pictures = list(read_pictures(source))
    path = (
        run_dir.path
        / "evaluations"
        / f"reference_{reference_key(pictures, protocol, resolution_px, extractors)}.safetensors"
    )
    while not broadcast_json(path.is_file()):
        lease = Lease(path.with_suffix(".lease"))
        run_and_agree(lease.take, act=world.rank == 0)
        with lease if world.rank == 0 else nullcontext():
            if broadcast_json(lease.held):
                build_reference(path, pictures, protocol, resolution_px, extractors, world)
                break
        time.sleep(POLL_S)  # another evaluator is at it
    found = read_reference(path)
    check_provenance(str(path), found, protocol, resolution_px, extractors)
    return found


def build_reference(
    path: Path,
    pictures: list[Picture],
    protocol: EvaluateConfig,
    resolution_px: int,
    extractors: list[Extractor],
    world: World,
) -> None:
    """Collective. Of every picture, brought to `resolution_px` as `encode` does."""
    store = FeatureStore(path.with_suffix(".partial"), len(pictures), protocol.batch_size)
    with progress(len(pictures), "img", "reference") as bar:
        for batch in store.missing(world.rank, world.world_size):
            pixels = torch.stack([_pixels(pictures[i], resolution_px) for i in batch])
            found = {
                f"{e.config.label}/{kind}": rows
                for e in extractors
                for kind, rows in e(pixels).items()
                if kind in COMPARED
            }
            digests = [list(bytes.fromhex(pictures[i].sha256())) for i in batch]
            store.put(batch, {**found, SHA256: torch.tensor(digests, dtype=torch.uint8)})
            bar.update(len(batch))
    barrier()
    if world.rank == 0:
        publish_reference(path, store, pictures, protocol, resolution_px, extractors)
        store.remove()
    barrier()


def publish_reference(
    path: Path,
    store: FeatureStore,
    pictures: list[Picture],
    protocol: EvaluateConfig,
    resolution_px: int,
    extractors: list[Extractor],
) -> None:
    tensors: dict[str, Tensor] = {}
    alone = (
        evenly_spaced(len(pictures), protocol.reference_features)
        if OF_FEATURES & set(protocol.metrics)
        else []
    )
    for extractor in extractors:
        label = extractor.config.label
        for kind in COMPARED:
            if next(store.rows(f"{label}/{kind}"), None) is not None:
                found = store.statistics(f"{label}/{kind}").tensors()
                tensors |= {f"{label}/{kind}/{name}": tensor for name, tensor in found.items()}
        if alone:
            tensors[f"{label}/features"] = store.whole(f"{label}/pooled")[alone].contiguous()
    grid, shown = path.with_suffix(".png"), evenly_spaced(len(pictures), protocol.grid_images)
    if shown:
        publish_grid(grid, torch.stack([_pixels(pictures[i], resolution_px) for i in shown]))
    fingerprint = hashlib.sha256()
    for picture, digest in zip(
        pictures, (row for rows in store.rows(SHA256) for row in rows), strict=True
    ):
        fingerprint.update(f"{picture.key} {bytes(digest.tolist()).hex()}\n".encode())
    facts = {
        "pictures": len(pictures),
        "compared_one_by_one": len(alone),
        "fingerprint": fingerprint.hexdigest(),
        "source": protocol.reference,
        "resolution_px": resolution_px,
        "extractors": {extractor.config.label: extractor.identity() for extractor in extractors},
        "grid": grid.name if shown else None,
    }
    save_tensors(path, tensors, {"facts": json.dumps(facts)})


def read_reference(path: Path) -> Reference:
    """Raises DataError."""
    try:
        tensors, metadata = load_tensors(path)
        facts = parse_json(metadata.get("facts", "").encode(), f"{path}: facts")
        if (problem := facts_problem(facts)) is not None:
            raise DataError(f"{path}: facts: {problem}")
        kinds = sorted({name.rpartition("/")[0] for name in tensors if name.endswith("/mean")})
        statistics = {
            kind: FeatureStatistics.from_tensors(
                {name: tensors[f"{kind}/{name}"] for name in STATISTICS}
            )
            for kind in kinds
        }
        features = {
            name.partition("/")[0]: tensor
            for name, tensor in tensors.items()
            if name.endswith("/features")
        }
        for label, rows in features.items():
            if rows.dim() != 2 or not rows.is_floating_point() or not rows.isfinite().all():
                raise DataError(
                    f"{label}/features: {rows.dtype} {tuple(rows.shape)}, wanted finite "
                    "numbers (N, D)"
                )
    except (DataError, KeyError, ValueError) as error:
        text = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DataError(
            f"{path}: no statistics as `lpl-pretrain reference` writes them ({text}): remove it "
            "and write them again"
        ) from None
    return Reference(statistics, features, {**facts, "file": str(path)})


def facts_problem(facts: Any) -> str | None:
    """What is wrong with what a file says of itself, if anything."""
    if not isinstance(facts, dict) or not isinstance(facts.get("extractors"), dict):
        return f"found {shown(facts)}, wanted an object with extractors"
    for key in ("pictures", "resolution_px"):
        if not is_count(facts.get(key)):
            return f"{key}: found {shown(facts.get(key))}, wanted an integer from 0"
    for label, identity in facts["extractors"].items():
        if not isinstance(identity, dict):
            return f"extractors.{shown(label)}: found {shown(identity)}, wanted an object"
    if not isinstance(facts.get("grid"), (str, type(None))):
        return f"grid: found {shown(facts['grid'])}, wanted a file name or null"
    return None


def check_provenance(
    source: str,
    found: Reference,
    protocol: EvaluateConfig,
    resolution_px: int,
    extractors: list[Extractor],
) -> None:
    """Raises ConfigError when these statistics and this protocol do not compare like with like."""
    problems = []
    if found.facts["resolution_px"] != resolution_px:
        problems.append(
            f"is of pictures of {found.facts['resolution_px']} px, the run makes {resolution_px} px"
        )
    for extractor in extractors:
        label, mine = extractor.config.label, extractor.identity()
        theirs = found.facts["extractors"].get(label)
        if theirs is None:
            problems.append(
                f"has no features by {label}, only by {sorted(found.facts['extractors'])}"
            )
        elif differ := [
            f"{key} {theirs.get(key)!r} there, {mine[key]!r} here"
            for key in mine
            if theirs.get(key) != mine[key]
        ]:
            problems.append(f"was made by another {label}: {'; '.join(differ)}")
        elif problem := _statistics_problem(found, extractor, protocol):
            problems.append(problem)
        elif OF_FEATURES & set(protocol.metrics) and label not in found.features:
            problems.append(
                "holds no single features, which "
                f"{sorted(OF_FEATURES & set(protocol.metrics))} compare"
            )
    if problems:
        raise ConfigError(
            f"reference={source}: "
            + "; ".join(problems)
            + ": make it anew with `lpl-pretrain reference`"
        )


def _statistics_problem(
    found: Reference, extractor: Extractor, protocol: EvaluateConfig
) -> str | None:
    label, dimension = extractor.config.label, extractor.dimension
    spatial = extractor.config.kind == "inception" and "spatial_fd" in protocol.metrics
    for kind in COMPARED if spatial else COMPARED[:1]:
        if f"{label}/{kind}" not in found.statistics:
            return f"holds no {kind} statistics by {label}"
    widths = [len(found.statistics[f"{label}/pooled"].mean)]
    widths += [rows.shape[1] for name, rows in found.features.items() if name == label]
    return (
        None
        if set(widths) == {dimension}
        else f"holds {widths} features by {label}, wanted {dimension}"
    )


def read_npz(path: Path, protocol: EvaluateConfig, extractors: list[Extractor]) -> Reference:
    """mu and sigma of the usual tools, which do not say what made them: FID's Inception is assumed.
    Raises ConfigError.
    """
    kinds = [extractor.config.kind for extractor in extractors]
    if kinds != ["inception"] or protocol.metrics != ["fd"]:
        raise ConfigError(
            f"reference={path}: a .npz holds mean and covariance of the FID Inception alone: "
            f"use metrics=[fd] and one extractor of kind inception, not {protocol.metrics} "
            f"with {kinds}"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[name]).double() for name in ("mu", "sigma"))
    except (
        Exception
    ) as problem:  # zipfile, zlib and numpy have errors of many kinds for a file that is no .npz
        raise ConfigError(
            f"reference={path}: wanted mu (D,) and sigma (D, D) ({str(problem)[:300]})"
        ) from None
    if mean.shape != (extractors[0].dimension,) or covariance.shape != 2 * mean.shape:
        raise ConfigError(
            f"reference={path}: mu {tuple(mean.shape)}, sigma {tuple(covariance.shape)}; wanted "
            f"{extractors[0].dimension}"
        )
    if (
        not mean.isfinite().all()
        or not covariance.isfinite().all()
        or (covariance.diagonal() < 0).any()
    ):
        raise ConfigError(f"reference={path}: wanted finite mu and sigma, and no negative variance")
    if (covariance - covariance.T).abs().max() > 1e-5 * covariance.abs().max():
        raise ConfigError(f"reference={path}: sigma is not symmetric, so that it is no covariance")
    statistics = FeatureStatistics(len(mean))
    statistics.count, statistics.mean, statistics.scatter = UNKNOWN + 1, mean, UNKNOWN * covariance
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    label = extractors[0].config.label
    return Reference(
        {f"{label}/pooled": statistics},
        {},
        {"file": str(path), "sha256": digest, "pictures": None, "grid": None},
    )


def reference_key(
    pictures: list[Picture],
    protocol: EvaluateConfig,
    resolution_px: int,
    extractors: list[Extractor],
) -> str:
    files = {Path(picture.path) for picture in pictures}
    stamps = sorted((path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files)
    alone = protocol.reference_features if OF_FEATURES & set(protocol.metrics) else 0
    facts = [
        stamps,
        len(pictures),
        resolution_px,
        [e.identity() for e in extractors],
        protocol.grid_images,
        alone,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most `count` of 0 ... total - 1, spread over all of them: neighbours in a source are often
    alike.
    """
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _pixels(picture: Picture, resolution_px: int) -> Tensor:
    return torch.tensor(to_square(picture.load(), resolution_px)).permute(2, 0, 1)
