"""Reference: statistics and features of real images, which generated images are compared with.

One safetensors file: `<extractor>/<kind>/{count, mean, scatter}` (stats.py), `<extractor>/features`
of at most `reference_features` images, and in its header, as JSON under `facts`, its provenance.  A
run keeps its own as evaluations/reference_<key>.safetensors (build_reference.py writes it).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpl_pretrain.config.extractors import EXTRACTORS, INCEPTION
from lpl_pretrain.config.metrics import FD, METRICS, image_metrics
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.strict_json import is_count, parse_json, shown
from lpl_pretrain.errors import ConfigError, DataError
from lpl_pretrain.evaluation.checksummed_tensors import load_tensors
from lpl_pretrain.evaluation.extractor import MAX_ERROR_LENGTH, Extractor
from lpl_pretrain.evaluation.stats import FeatureStatistics

UNKNOWN_DEGREES_OF_FREEDOM = 2**30
"""Number of images less one that is assumed for a .npz, which does not say it: large, so that the
rank of the covariance is not taken to be lower than it is.
"""
MAX_ASYMMETRY = 1e-5
"""Largest |sigma - sigma^T| of a .npz, relative to the largest |sigma|."""
STATISTICS = ("count", "mean", "scatter")
COMPARED = ("pooled", "spatial")
"""Kinds of features that have statistics."""


@dataclass(frozen=True)
class Reference:
    """Real images as metrics need them."""

    statistics: dict[str, FeatureStatistics]
    """Mean and covariance, by `<extractor>/<kind>`."""
    features: dict[str, Tensor]
    """Pooled features (N, D) of single images, by extractor; empty when no metric compares them."""
    provenance: dict[str, Any]
    """`pictures` (their number), `fingerprint`, `resolution_px`, `extractors`, and file names."""


def read_reference(path: Path) -> Reference:
    """Read a file that `lpl-pretrain reference` wrote.  Raises DataError."""
    try:
        tensors, metadata = load_tensors(path)
        provenance = parse_json(metadata.get("facts", "").encode(), f"{path}: facts")
        if (problem := provenance_problem(provenance)) is not None:
            raise DataError(f"{path}: facts: {problem}")
        statistics = _statistics_of(tensors)
        features = _features_of(tensors)
    except (DataError, KeyError, ValueError) as error:
        text = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DataError(
            f"{path}: no statistics as `lpl-pretrain reference` writes them ({text}): remove it "
            "and write them again"
        ) from None
    return Reference(statistics, features, {**provenance, "file": str(path)})


def _statistics_of(tensors: dict[str, Tensor]) -> dict[str, FeatureStatistics]:
    """Statistics by `<extractor>/<kind>`.  Raises DataError or KeyError for an incomplete file."""
    kinds = sorted({name.rpartition("/")[0] for name in tensors if name.endswith("/mean")})
    return {
        kind: FeatureStatistics.from_tensors(
            {name: tensors[f"{kind}/{name}"] for name in STATISTICS}
        )
        for kind in kinds
    }


def _features_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features by extractor.  Raises DataError for another type or shape, and for NaN."""
    features = {
        name.partition("/")[0]: tensor
        for name, tensor in tensors.items()
        if name.endswith("/features")
    }
    for label, rows in features.items():
        if rows.dim() != 2 or not rows.is_floating_point() or not rows.isfinite().all():
            raise DataError(
                f"{label}/features: {rows.dtype} {tuple(rows.shape)}, wanted finite numbers (N, D)"
            )
    return features


def provenance_problem(provenance: Any) -> str | None:
    """Problem of a file's provenance, if any: a key that is missing or has another type."""
    if not isinstance(provenance, dict) or not isinstance(provenance.get("extractors"), dict):
        return f"found {shown(provenance)}, wanted an object with extractors"
    for key in ("pictures", "resolution_px"):
        if not is_count(provenance.get(key)):
            return f"{key}: found {shown(provenance.get(key))}, wanted an integer from 0"
    for label, identity in provenance["extractors"].items():
        if not isinstance(identity, dict):
            return f"extractors.{shown(label)}: found {shown(identity)}, wanted an object"
    if not isinstance(provenance.get("grid"), (str, type(None))):
        return f"grid: found {shown(provenance['grid'])}, wanted a file name or null"
    return None


def check_provenance(
    source: str,
    reference: Reference,
    protocol: EvaluateConfig,
    resolution_px: int,
    extractors: list[Extractor],
) -> None:
    """Raise ConfigError unless the reference fits the extractors and the run's resolution."""
    problems = []
    theirs_px = reference.provenance["resolution_px"]
    if theirs_px != resolution_px:
        problems.append(f"is of images of {theirs_px} px, the run generates {resolution_px} px")
    for extractor in extractors:
        if problem := _extractor_problem(reference, extractor, protocol):
            problems.append(problem)
    if problems:
        raise ConfigError(
            f"reference={source}: "
            + "; ".join(problems)
            + ": write it again with `lpl-pretrain reference`"
        )


def _extractor_problem(
    reference: Reference, extractor: Extractor, protocol: EvaluateConfig
) -> str | None:
    label = extractor.config.label
    mine = extractor.identity()
    theirs = reference.provenance["extractors"].get(label)
    if theirs is None:
        return f"has no features by {label}, only by {sorted(reference.provenance['extractors'])}"
    differences = [
        f"{key} {theirs.get(key)!r} there, {mine[key]!r} here"
        for key in mine
        if theirs.get(key) != mine[key]
    ]
    if differences:
        return f"was made by another {label}: {'; '.join(differences)}"
    if problem := _statistics_problem(reference, extractor, protocol):
        return problem
    need_features = image_metrics(protocol.metrics)
    if need_features and label not in reference.features:
        return f"has no features of single images, which {need_features} compare"
    return None


def _statistics_problem(
    reference: Reference, extractor: Extractor, protocol: EvaluateConfig
) -> str | None:
    label = extractor.config.label
    outputs = EXTRACTORS[extractor.config.kind].outputs
    spatial = "spatial" in outputs and any(
        METRICS[name].output == "spatial" for name in protocol.metrics
    )
    for kind in COMPARED if spatial else COMPARED[:1]:
        if f"{label}/{kind}" not in reference.statistics:
            return f"has no {kind} statistics by {label}"
    widths = [len(reference.statistics[f"{label}/pooled"].mean)]
    if label in reference.features:
        widths.append(reference.features[label].shape[1])
    if set(widths) != {extractor.dimension}:
        return f"has {widths} features by {label}, wanted {extractor.dimension}"
    return None


def read_npz(path: Path, protocol: EvaluateConfig, extractors: list[Extractor]) -> Reference:
    """Read mu and sigma as other tools write them.  Raises ConfigError.

    The file does not say which network they are of: FID's Inception is assumed.
    """
    kinds = [extractor.config.kind for extractor in extractors]
    if kinds != [INCEPTION.kind] or protocol.metrics != [FD.name]:
        raise ConfigError(
            f"reference={path}: a .npz has mean and covariance of the FID Inception alone: "
            f"use metrics=[{FD.name}] and one extractor of kind {INCEPTION.kind}, not "
            f"{protocol.metrics} with {kinds}"
        )
    mean, covariance = _read_gaussian(path, extractors[0].dimension)
    statistics = FeatureStatistics(len(mean))
    statistics.count = UNKNOWN_DEGREES_OF_FREEDOM + 1
    statistics.mean = mean
    statistics.scatter = UNKNOWN_DEGREES_OF_FREEDOM * covariance
    provenance = {
        "file": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "pictures": None,
        "grid": None,
    }
    return Reference({f"{extractors[0].config.label}/pooled": statistics}, {}, provenance)


def _read_gaussian(path: Path, dimension: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of a .npz, float64.  Raises ConfigError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean = torch.from_numpy(file["mu"]).double()
            covariance = torch.from_numpy(file["sigma"]).double()
    except Exception as error:
        # zipfile, zlib and numpy raise errors of many kinds for a file that is no .npz
        raise ConfigError(
            f"reference={path}: wanted mu (D,) and sigma (D, D) ({str(error)[:MAX_ERROR_LENGTH]})"
        ) from None
    if mean.shape != (dimension,) or covariance.shape != 2 * mean.shape:
        raise ConfigError(
            f"reference={path}: mu {tuple(mean.shape)}, sigma {tuple(covariance.shape)}; wanted "
            f"D = {dimension}"
        )
    if (
        not mean.isfinite().all()
        or not covariance.isfinite().all()
        or (covariance.diagonal() < 0).any()
    ):
        raise ConfigError(f"reference={path}: wanted finite mu and sigma, and no negative variance")
    asymmetry = (covariance - covariance.T).abs().max()
    if asymmetry > MAX_ASYMMETRY * covariance.abs().max():
        raise ConfigError(f"reference={path}: sigma is not symmetric, so it is no covariance")
    return mean, covariance
