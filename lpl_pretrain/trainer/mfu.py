"""How much arithmetic an update is, and what share of the device's peak a run reaches (MFU, arXiv
2204.02311, appendix B).

Counted once, on meta tensors: forward and backward of the denoiser, and what LPL needs of the
decoder.  What activation checkpointing computes a second time is not counted, so it lowers the
share.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import nn

from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.losses.lpl.features import DecoderFeatures
from lpl_pretrain.losses.lpl.lpl import LatentPerceptualLoss
from lpl_pretrain.models.build import build_on_meta
from lpl_pretrain.planning.flops import count_flops

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class FlopsPerUpdate:
    denoiser: float
    """FLOPs of one update on one device."""
    lpl: float
    """As above, when LPL is on."""
    peak: float | None
    """FLOP/s of the device; None: not known."""

    def rates(self, seconds: float, *, updates: int, with_lpl: int) -> dict[str, float]:
        """Of one device, over `updates` updates, `with_lpl` of them with LPL."""
        achieved = (updates * self.denoiser + with_lpl * self.lpl) / seconds
        return {
            "tflops_per_s": achieved / 1e12,
            **({} if self.peak is None else {"mfu": achieved / self.peak}),
        }


def denoiser_flops(
    config: TrainConfig, index: DatasetIndex, text: TextShape | None = None
) -> float:
    """Of forward and backward of a sample, on average over the buckets' samples."""
    model, cond = build_on_meta(config.model, index, text)
    t = torch.empty(1, device="meta")

    def sample(height: int, width: int) -> None:
        z_t = torch.empty(1, index.latent.channels, height, width, device="meta")
        model(z_t, t, cond).output.sum().backward()

    return _mean(index, sample)


def lpl_flops(config: LPLConfig, features: DecoderFeatures, index: DatasetIndex) -> float:
    """Of both branches and the gradient at z0_hat of a sample, on average over the buckets'
    samples; `features` uncompiled.
    """
    loss = LatentPerceptualLoss(
        config.model_copy(update={"activation_checkpointing": False}), on_meta(features)
    )
    weights, places = torch.empty(1, device="meta"), torch.empty(1, 2, device="meta")

    def sample(height: int, width: int) -> None:
        z0, z0_hat = torch.empty(2, 1, index.latent.channels, height, width, device="meta")
        loss(z0, z0_hat, weights, places)

    return _mean(index, sample)


def on_meta(module: AnyModule) -> AnyModule:
    """A copy without data, whatever the size."""
    meta = {}
    for tensor in chain(module.parameters(), module.buffers()):
        empty = tensor.detach().to("meta")
        meta[id(tensor)] = (
            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    return deepcopy(module, meta)


def _mean(index: DatasetIndex, sample: Callable[[int, int], None]) -> float:
    """FLOPs of `sample(height, width)`, on average over the samples of all buckets."""
    total = 0
    for bucket in index.buckets:
        total += bucket.samples * count_flops(partial(sample, bucket.height, bucket.width))
    return total / index.samples
