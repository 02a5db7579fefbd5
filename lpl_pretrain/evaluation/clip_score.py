"""CLIPScore (arXiv 2104.08718, equation 1), in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.config import metrics
from lpl_pretrain.evaluation.metric import Estimate, MetricInputs, MetricSpec


def clip_score(images: Tensor, captions: Tensor) -> float:
    """Mean over N of 100 max(cos, 0) of embeddings (N, D): the scale that common tools print.

    The paper's own scale is 2.5 max(cos, 0).
    """
    cosine = torch.nn.functional.cosine_similarity(images.double(), captions.double(), dim=1)
    return 100 * cosine.clamp(min=0).mean().item()


def _compute(inputs: MetricInputs) -> list[Estimate]:
    return [Estimate(clip_score(inputs.generated_features(), inputs.generated_features("text")))]


CLIP_SCORE = MetricSpec(metrics.CLIP_SCORE, _compute)
