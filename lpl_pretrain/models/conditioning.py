"""What the denoiser is told besides z_t and t."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    labels: Tensor  # (B,) int64 class ids; `num_classes` is the null class


def class_conditioning(labels: Tensor, num_classes: int, dropped: Tensor | None = None) -> Conditioning:
    """Class ids to conditions; unlabelled samples (-1) and those where `dropped` (B,) bool is True get the null class."""
    null = labels < 0 if dropped is None else (labels < 0) | dropped
    return Conditioning(torch.where(null, num_classes, labels))
