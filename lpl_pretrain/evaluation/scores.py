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
from lpl_pretrain.evaluation.fd_infinity import bootstrap, frechet_infinity
from lpl_pretrain.evaluation.feature_store import FeatureStore
from lpl_pretrain.evaluation.features import Extractor
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
class Case:
    protocol: EvaluateConfig
    extractor: Extractor
    made: FeatureStore
    real: Reference

    @property
    def label(self) -> str:
        return self.extractor.config.label

    def made_rows(self, kind: str) -> Tensor:
        return self.made.whole(f"{self.label}/{kind}").to(self.extractor.device)

    def real_rows(self) -> Tensor:
        return self.real.features[self.label].to(self.extractor.device)

    def entry(self, metric: str, value: float, **more: float) -> Entry:
        return {"metric": self.extractor.named(metric), "value": value, **more}


def scores(
    protocol: EvaluateConfig, extractor: Extractor, made: FeatureStore, real: Reference
) -> Iterator[Entry]:
    """All that `protocol` asks of this extractor."""
    case = Case(protocol, extractor, made, real)
    for metric in metrics_of(extractor.config, protocol.metrics):
        yield from METRICS[metric](case)


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


def _frechet(case: Case, metric: str, kind: str) -> Entry:
    real, name = case.real.statistics[f"{case.label}/{kind}"], f"{case.label}/{kind}"
    entry = case.entry(metric, frechet_distance(case.made.statistics(name), real))
    if len(case.made.batches) > 1:
        entry["at_half"] = frechet_distance(case.made.statistics(name, share=0.5), real)
    if case.protocol.bootstrap:
        entry["std"] = bootstrap(
            case.made_rows(kind), real, repeats=case.protocol.bootstrap, seed=case.protocol.seed
        )[1]
    return entry


def _fd(case: Case) -> Iterator[Entry]:
    yield _frechet(case, "fd", "pooled")


def _spatial_fd(case: Case) -> Iterator[Entry]:
    yield _frechet(case, "spatial_fd", "spatial")


def _fd_infinity(case: Case) -> Iterator[Entry]:
    real = case.real.statistics[f"{case.label}/pooled"]
    yield case.entry(
        "fd_infinity", frechet_infinity(case.made_rows("pooled"), real, seed=case.protocol.seed)
    )


def _kid(case: Case) -> Iterator[Entry]:
    protocol = case.protocol
    found = kernel_inception_distance(
        case.made_rows("pooled"),
        case.real_rows(),
        subsets=protocol.kid_subsets,
        subset_size=protocol.kid_subset_size,
        seed=protocol.seed,
    )
    yield case.entry("kid", found.value, std=found.std, low=found.low, high=found.high)


def _precision_recall(case: Case) -> Iterator[Entry]:
    precision, recall = precision_recall(case.made_rows("pooled"), case.real_rows())
    yield case.entry("precision", precision)
    yield case.entry("recall", recall)


def _density_coverage(case: Case) -> Iterator[Entry]:
    density, coverage = density_coverage(case.made_rows("pooled"), case.real_rows())
    yield case.entry("density", density)
    yield case.entry("coverage", coverage)


def _inception_score(case: Case) -> Iterator[Entry]:
    mean, std = inception_score(case.made_rows("logits"), seed=case.protocol.seed)
    yield case.entry("inception_score", mean, std=std)


def _cmmd(case: Case) -> Iterator[Entry]:
    yield case.entry("cmmd", cmmd(case.made_rows("pooled"), case.real_rows()))


def _clip_score(case: Case) -> Iterator[Entry]:
    yield case.entry("clip_score", clip_score(case.made_rows("pooled"), case.made_rows("text")))


METRICS: dict[str, Callable[[Case], Iterator[Entry]]] = {
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
