"""The contract of a metric: what its function gets, what it returns.

A metric's MetricSpec stands beside its function and joins registry.py's list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lpl_pretrain.config.metrics import MetricInfo
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.evaluation.extractor import Extractor
from lpl_pretrain.evaluation.feature_store import FeatureStore
from lpl_pretrain.evaluation.reference import Reference
from lpl_pretrain.evaluation.stats import FeatureStatistics


@dataclass(frozen=True, slots=True)
class Estimate:
    """Value of one score, and its uncertainty where the metric knows it."""

    value: float
    at_half: float | None = None
    """The same score from the first half of the images: shows the bias of their number."""
    std: float | None = None
    """Standard deviation or standard error, as the metric defines it."""
    low: float | None = None
    """Lower end of the 95 % confidence interval."""
    high: float | None = None


@dataclass(frozen=True, slots=True)
class MetricInputs:
    """Features of generated and of real images, by one extractor."""

    protocol: EvaluateConfig
    extractor: Extractor
    generated: FeatureStore
    reference: Reference

    def generated_features(self, kind: str = "pooled") -> Tensor:
        """All generated images' features, (N, D), on the extractor's device."""
        return self.generated.read_all(self._name(kind)).to(self.extractor.device)

    def generated_statistics(self, kind: str, *, fraction: float = 1.0) -> FeatureStatistics:
        """Mean and covariance of generated images' features; `fraction`: of the batches."""
        return self.generated.statistics(self._name(kind), fraction=fraction)

    def real_features(self) -> Tensor:
        """Pooled features of single real images, (M, D); for metrics with `compares_images`."""
        return self.reference.features[self.extractor.config.label].to(self.extractor.device)

    def real_statistics(self, kind: str) -> FeatureStatistics:
        """Mean and covariance of all real images' features."""
        return self.reference.statistics[self._name(kind)]

    def _name(self, kind: str) -> str:
        return f"{self.extractor.config.label}/{kind}"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """A metric: its description (config/metrics.py) and the function that computes it."""

    info: MetricInfo
    compute: Callable[[MetricInputs], Sequence[Estimate]]
    """Returns one estimate for each of `info.scores`, in their order."""
