"""From features of generated and of real pictures to the entries of a record: one function for each
metric of a protocol.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lpl_pretrain.config.evaluation import metrics_of
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.evaluation.clip import clip_score
from lpl_pretrain.evaluation.extractor import Extractor
from lpl_pretrain.evaluation.fd_infinity import bootstrap, frechet_infinity
from lpl_pretrain.evaluation.feature_store import FeatureStore
from lpl_pretrain.evaluation.fid import frechet_distance
from lpl_pretrain.evaluation.inception_score import inception_score
from lpl_pretrain.evaluation.kid_cmmd import cmmd, kernel_inception_distance
from lpl_pretrain.evaluation.prdc import density_coverage, precision_recall
from lpl_pretrain.evaluation.reference import Reference

Entry = dict[str, Any]
"""`metric`, `value`, its `std`, `low` and `high` where known, and `at_half`, the Frechet distance
of half of the pictures.

With `repeats` also `values`, one for each seed."""


@dataclass(frozen=True)
class MetricInputs:
    protocol: EvaluateConfig
    extractor: Extractor
    generated: FeatureStore
    real: Reference

    @property
    def label(self) -> str:
        return self.extractor.config.label

    def generated_features(self, kind: str) -> Tensor:
        return self.generated.whole(f"{self.label}/{kind}").to(self.extractor.device)

    def real_features(self) -> Tensor:
        return self.real.features[self.label].to(self.extractor.device)

    def entry(self, metric: str, value: float, **more: float) -> Entry:
        return {"metric": self.extractor.named(metric), "value": value, **more}


def scores(
    protocol: EvaluateConfig, extractor: Extractor, generated: FeatureStore, real: Reference
) -> Iterator[Entry]:
    """All that `protocol` asks of this extractor."""
    inputs = MetricInputs(protocol, extractor, generated, real)
    for metric in metrics_of(extractor.config, protocol.metrics):
        yield from METRICS[metric](inputs)


def over_seeds(repeats: list[list[Entry]]) -> list[Entry]:
    """One entry for each score of several sets of pictures: the mean, and what one set more would
    differ from it by.
    """
    if len(repeats) == 1:
        return repeats[0]
    found = []
    for same in zip(*repeats, strict=True):
        values = [entry["value"] for entry in same]
        entry = {
            "metric": same[0]["metric"],
            "value": statistics.fmean(values),
            "std": statistics.stdev(values),
            "values": values,
        }
        if "at_half" in same[0]:
            entry["at_half"] = statistics.fmean(entry["at_half"] for entry in same)
        found.append(entry)
    return found


def _frechet(inputs: MetricInputs, metric: str, kind: str) -> Entry:
    real, name = inputs.real.statistics[f"{inputs.label}/{kind}"], f"{inputs.label}/{kind}"
    entry = inputs.entry(metric, frechet_distance(inputs.generated.statistics(name), real))
    if len(inputs.generated.batches) > 1:
        entry["at_half"] = frechet_distance(inputs.generated.statistics(name, share=0.5), real)
    if inputs.protocol.bootstrap:
        entry["std"] = bootstrap(
            inputs.generated_features(kind),
            real,
            repeats=inputs.protocol.bootstrap,
            seed=inputs.protocol.seed,
        )[1]
    return entry


def _fd(inputs: MetricInputs) -> Iterator[Entry]:
    yield _frechet(inputs, "fd", "pooled")


def _spatial_fd(inputs: MetricInputs) -> Iterator[Entry]:
    yield _frechet(inputs, "spatial_fd", "spatial")


def _fd_infinity(inputs: MetricInputs) -> Iterator[Entry]:
    real = inputs.real.statistics[f"{inputs.label}/pooled"]
    yield inputs.entry(
        "fd_infinity",
        frechet_infinity(inputs.generated_features("pooled"), real, seed=inputs.protocol.seed),
    )


def _kid(inputs: MetricInputs) -> Iterator[Entry]:
    protocol = inputs.protocol
    found = kernel_inception_distance(
        inputs.generated_features("pooled"),
        inputs.real_features(),
        subsets=protocol.kid_subsets,
        subset_size=protocol.kid_subset_size,
        seed=protocol.seed,
    )
    yield inputs.entry("kid", found.value, std=found.std, low=found.low, high=found.high)


def _precision_recall(inputs: MetricInputs) -> Iterator[Entry]:
    precision, recall = precision_recall(
        inputs.generated_features("pooled"), inputs.real_features()
    )
    yield inputs.entry("precision", precision)
    yield inputs.entry("recall", recall)


def _density_coverage(inputs: MetricInputs) -> Iterator[Entry]:
    density, coverage = density_coverage(
        inputs.generated_features("pooled"), inputs.real_features()
    )
    yield inputs.entry("density", density)
    yield inputs.entry("coverage", coverage)


def _inception_score(inputs: MetricInputs) -> Iterator[Entry]:
    mean, std = inception_score(inputs.generated_features("logits"), seed=inputs.protocol.seed)
    yield inputs.entry("inception_score", mean, std=std)


def _cmmd(inputs: MetricInputs) -> Iterator[Entry]:
    yield inputs.entry("cmmd", cmmd(inputs.generated_features("pooled"), inputs.real_features()))


def _clip_score(inputs: MetricInputs) -> Iterator[Entry]:
    yield inputs.entry(
        "clip_score",
        clip_score(inputs.generated_features("pooled"), inputs.generated_features("text")),
    )


METRICS: dict[str, Callable[[MetricInputs], Iterator[Entry]]] = {
    "fd": _fd,
    "spatial_fd": _spatial_fd,
    "fd_infinity": _fd_infinity,
    "kid": _kid,
    "precision_recall": _precision_recall,
    "density_coverage": _density_coverage,
    "inception_score": _inception_score,
    "cmmd": _cmmd,
    "clip_score": _clip_score,
}
