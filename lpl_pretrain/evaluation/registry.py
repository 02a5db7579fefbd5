"""Collects the metrics and feature extractors; each spec stands beside its code."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from lpl_pretrain.config.evaluation import metrics_of
from lpl_pretrain.config.metrics import record_name
from lpl_pretrain.config.protocol import ExtractorConfig
from lpl_pretrain.evaluation import (
    clip,
    clip_score,
    fd_infinity,
    fid,
    inception,
    inception_score,
    kid_cmmd,
    prdc,
    timm_networks,
)
from lpl_pretrain.evaluation.extractor import Extractor, ExtractorSpec
from lpl_pretrain.evaluation.metric import MetricInputs, MetricSpec

METRICS: dict[str, MetricSpec] = {
    spec.info.name: spec
    for spec in (
        fid.FD,
        fid.SPATIAL_FD,
        fd_infinity.FD_INFINITY,
        kid_cmmd.KID,
        prdc.PRECISION_RECALL,
        prdc.DENSITY_COVERAGE,
        inception_score.INCEPTION_SCORE,
        kid_cmmd.CMMD,
        clip_score.CLIP_SCORE,
    )
}
EXTRACTORS: dict[str, ExtractorSpec] = {
    spec.info.kind: spec
    for spec in (
        timm_networks.EFFICIENTNET_LITE0,
        inception.INCEPTION,
        timm_networks.TIMM,
        clip.CLIP,
    )
}

Entry = dict[str, Any]
"""One score in a record: `metric`, `value`, and `at_half`, `std`, `low`, `high` where known.

With `repeats` also `values`, one for each seed.
"""


def load_extractor(config: ExtractorConfig, device: torch.device) -> Extractor:
    """Load the network; `config` has passed `extractor_problems`.

    Raises ConfigError for weights that do not fit.
    """
    return EXTRACTORS[config.kind].load(config, device)


def compute_scores(inputs: MetricInputs) -> Iterator[Entry]:
    """Compute every metric of the protocol that this extractor's features allow."""
    extractor = inputs.extractor
    for name in metrics_of(extractor.config, inputs.protocol.metrics):
        spec = METRICS[name]
        for score, estimate in zip(spec.info.scores, spec.compute(inputs), strict=True):
            known = {key: value for key, value in asdict(estimate).items() if value is not None}
            yield {"metric": record_name(score, extractor.suffix), **known}


def average_over_seeds(repeats: list[list[Entry]]) -> list[Entry]:
    """Average each score over several sets of images, one set a seed; `std` is over the sets."""
    if len(repeats) == 1:
        return repeats[0]
    averaged = []
    for same_score in zip(*repeats, strict=True):
        values = [entry["value"] for entry in same_score]
        average = {
            "metric": same_score[0]["metric"],
            "value": statistics.fmean(values),
            "std": statistics.stdev(values),
            "values": values,
        }
        if "at_half" in same_score[0]:
            average["at_half"] = statistics.fmean(entry["at_half"] for entry in same_score)
        averaged.append(average)
    return averaged
