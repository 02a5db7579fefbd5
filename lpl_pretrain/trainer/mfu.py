"""Model FLOPs utilisation (MFU): the rate of a run beside the peak of its device (arXiv 2204.02311,
appendix B).

FLOPs are counted once, on meta tensors: forward and backward of the denoiser, and what each loss
term adds.  Recomputation by activation checkpointing is not counted, so it lowers the MFU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.losses.term import LossTerm
from lpl_pretrain.models.build import build_on_meta
from lpl_pretrain.planning.flops import mean_over_buckets


@dataclass(frozen=True, slots=True)
class FlopsPerUpdate:
    denoiser: float
    """FLOPs of one update on one device, without loss terms."""
    terms: list[LossTerm]
    peak: float | None
    """Peak FLOP/s of the device; None: unknown."""

    def throughput(self, seconds: float, steps: range) -> dict[str, float]:
        """Rate of one device over the updates `steps` (numbered from 0), which took `seconds`."""
        total = len(steps) * self.denoiser
        for term in self.terms:
            total += sum(map(term.active, steps)) * term.flops_per_update()
        achieved = total / seconds
        rates = {"tflops_per_s": achieved / 1e12}
        if self.peak is not None:
            rates["mfu"] = achieved / self.peak
        return rates


def denoiser_flops(
    config: TrainConfig, index: DatasetIndex, text: TextShape | None = None
) -> float:
    """FLOPs of forward and backward of a sample, averaged over the buckets' samples."""
    model, cond = build_on_meta(config.model, index, text)
    t = torch.empty(1, device="meta")

    def sample(height: int, width: int) -> None:
        z_t = torch.empty(1, index.latent.channels, height, width, device="meta")
        model(z_t, t, cond).output.sum().backward()

    return mean_over_buckets(index, sample)
