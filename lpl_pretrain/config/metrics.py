"""Metrics, as far as a configuration or a report needs to know them: names, titles, direction.

This is the only list of metric names.  evaluation/registry.py adds the function that computes each.
Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lpl_pretrain.config.extractors import Output


@dataclass(frozen=True, slots=True)
class Score:
    """One number that a metric yields."""

    name: str
    """Name in records and charts, followed by `_<extractor>`: fd_efficientnet_lite0."""
    title: str
    higher_is_better: bool = False
    fid_name: str | None = None
    """Name that the field gives to this score of the published FID Inception; it has no suffix."""
    fid_title: str | None = None


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """One entry of a protocol's `metrics`; its function is the MetricSpec of the same name."""

    name: str
    output: Output
    """Output that it compares; it is computed for every extractor that has this output."""
    scores: tuple[Score, ...]
    compares_images: bool = False
    """Whether it needs the features of single real images, and not mean and covariance alone."""
    compares_captions: bool = False
    """Whether it needs embeddings of the captions that images were generated from."""
    biased_by_few_images: bool = False
    """Whether fewer images than features bias it upwards."""


FD = MetricInfo(
    "fd",
    "features",
    (
        Score(
            "fd",
            "Frechet distance",
            fid_name="fid",
            fid_title="Frechet Inception Distance",
        ),
    ),
    biased_by_few_images=True,
)
SPATIAL_FD = MetricInfo(
    "spatial_fd",
    "spatial",
    (Score("spatial_fd", "Spatial Frechet distance", fid_name="sfid", fid_title="Spatial FID"),),
    biased_by_few_images=True,
)
FD_INFINITY = MetricInfo(
    "fd_infinity",
    "features",
    (
        Score(
            "fd_infinity",
            "Frechet distance at infinitely many images",
            fid_name="fid_infinity",
            fid_title="FID-infinity",
        ),
    ),
    biased_by_few_images=True,
)
KID = MetricInfo(
    "kid",
    "features",
    (Score("kid", "Kernel distance", fid_name="kid", fid_title="Kernel Inception Distance"),),
    compares_images=True,
)
PRECISION_RECALL = MetricInfo(
    "precision_recall",
    "features",
    (
        Score("precision", "Precision", higher_is_better=True),
        Score("recall", "Recall", higher_is_better=True),
    ),
    compares_images=True,
)
DENSITY_COVERAGE = MetricInfo(
    "density_coverage",
    "features",
    (
        Score("density", "Density", higher_is_better=True),
        Score("coverage", "Coverage", higher_is_better=True),
    ),
    compares_images=True,
)
INCEPTION_SCORE = MetricInfo(
    "inception_score",
    "logits",
    (Score("inception_score", "Inception Score", higher_is_better=True),),
)
CMMD = MetricInfo(
    "cmmd",
    "joint",
    (Score("cmmd", "CLIP maximum mean discrepancy"),),
    compares_images=True,
)
CLIP_SCORE = MetricInfo(
    "clip_score",
    "joint",
    (Score("clip_score", "CLIPScore", higher_is_better=True),),
    compares_captions=True,
)

METRICS: dict[str, MetricInfo] = {
    info.name: info
    for info in (
        FD,
        SPATIAL_FD,
        FD_INFINITY,
        KID,
        PRECISION_RECALL,
        DENSITY_COVERAGE,
        INCEPTION_SCORE,
        CMMD,
        CLIP_SCORE,
    )
}


def record_name(score: Score, suffix: str) -> str:
    """Name of a score in records; `suffix`: the extractor's, "" for the published FID Inception."""
    return f"{score.name}{suffix}" if suffix else score.fid_name or score.name


def find_score(name: str) -> tuple[Score, str] | None:
    """(score, label of the extractor) of a name in a record; the label is "" where it has none.

    None for a name that no metric of this version gives.
    """
    scores = [score for info in METRICS.values() for score in info.scores]
    for score in scores:
        if name in (score.name, score.fid_name):
            return score, ""
    fitting = [score for score in scores if name.startswith(f"{score.name}_")]
    if not fitting:
        return None
    longest = max(fitting, key=lambda score: len(score.name))
    return longest, name.removeprefix(f"{longest.name}_")


def higher_is_better(name: str) -> bool:
    """Direction of a score, by its name in a record; False for an unknown one."""
    found = find_score(name)
    return found is not None and found[0].higher_is_better


def score_title(name: str) -> str:
    """Title of a score, by its name in a record: "Frechet distance (efficientnet_lite0)"."""
    found = find_score(name)
    if found is None:
        return name.replace("_", " ").capitalize()
    score, label = found
    if name == score.fid_name:
        return score.fid_title or score.title
    return f"{score.title} ({label})" if label else score.title


def image_metrics(names: Iterable[str]) -> list[str]:
    """Metrics of `names` that compare single images with single images, sorted."""
    return sorted(name for name in set(names) if METRICS[name].compares_images)
