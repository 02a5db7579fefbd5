"""The Latent Perceptual Loss (arXiv 2411.04873): decoder features of the one-step estimate against
those of the clean latent.

    L_LPL = mean over samples of  gate * mean over stages l of  omega_l * mean over channels and
    positions of
            ( rho_l * (phi'_l - phihat'_l) )^2

phi are features of z0, phihat those of z0_hat, prime is normalisation, rho the keep mask, omega_l =
H / H_l.  Means everywhere, and gated-out samples count as zeros, so that the weight means the same
for any batch and number of ranks.

Shapes: z0, z0_hat (K, C, H, W) float32; weights, loss (K,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.losses.lpl.batch_statistics import BatchStatistics, StageFeatures, measure
from lpl_pretrain.losses.lpl.crop import Windows
from lpl_pretrain.losses.lpl.distance import difference, distance, pointwise
from lpl_pretrain.losses.lpl.features import DecoderFeatures, stage_number
from lpl_pretrain.losses.lpl.normalization import Statistics
from lpl_pretrain.losses.lpl.tape import Tape


@dataclass(frozen=True, slots=True)
class StageReport:
    """Measurements of one decoder stage; each (K,), meaningful where the gate is open."""

    contribution: Tensor
    """omega_l * distance / number of stages"""
    keep_fraction: Tensor
    """Fraction of positions that the outlier mask kept."""
    std_ratio: Tensor
    """Std over space of predicted / clean features, mean over channels."""

    @classmethod
    def concatenate(cls, parts: list[StageReport]) -> StageReport:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__))


@dataclass(frozen=True, slots=True)
class LPLOutput:
    loss: Tensor
    """(K,) times its weight, zero where the gate is shut; carries its gradient to z0_hat."""
    gradient: Tensor
    """(K, C, H, W) d loss.sum() / d z0_hat."""
    stages: dict[str, StageReport]


@dataclass(frozen=True, slots=True)
class _Chunk:
    z0: Tensor
    z0_hat: Tensor
    weights: Tensor
    windows: Windows | None


class _WithGradient(torch.autograd.Function):
    """`loss` (K,) with `gradient` (K, C, H, W), the known gradient of its sum at `z0_hat`."""

    @staticmethod
    def forward(
        ctx: Any, z0_hat: Tensor, loss: Tensor, gradient: Tensor, one_factor: bool
    ) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.one_factor = one_factor
        return loss.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        if ctx.one_factor:
            factor = torch.where(factor == factor[0], factor, torch.nan)
        return gradient * factor.view(-1, 1, 1, 1), None, None, None


class LatentPerceptualLoss(nn.Module):
    """Holds the frozen decoder; knows nothing of schedules, steps or ranks."""

    def __init__(
        self,
        config: LPLConfig,
        features: DecoderFeatures,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        """`sum_over_ranks` is used with `normalize.over: batch`, equally often on all ranks."""
        super().__init__()
        self.config = config
        self.features = features
        self.sum_over_ranks = sum_over_ranks

    def forward(
        self, z0: Tensor, z0_hat: Tensor, weights: Tensor, crop_positions: Tensor | None = None
    ) -> LPLOutput:
        """Loss and its gradient at `z0_hat`, `chunk_size` samples inside the decoder at a time.

        The gradient is computed here, while the features are in memory.  `loss` passes it to
        autograd, so that backward of any weighted sum of `loss` reaches z0_hat and the denoiser.
        With `normalize.over: batch` samples depend on each other: all of `loss` must then have one
        factor, else the gradient is NaN.

        `weights` (K,) are 0 where the gate is shut: there a sample is compared with itself, finite
        and exactly 0.  `crop_positions` (K, 2) in [0, 1) say where `lpl.crop` cuts.
        """
        estimate = z0_hat
        z0_hat = torch.where((weights > 0).view(-1, 1, 1, 1), z0_hat.detach(), z0)
        height, width = z0.shape[-2:]
        windows = None
        if self.config.crop is not None:
            assert crop_positions is not None, "lpl.crop needs crop_positions"
            windows = Windows.at(crop_positions, self.config.crop, height, width)
            z0, z0_hat = windows.cut(z0), windows.cut(z0_hat)
        chunks = self._chunks(z0, z0_hat, weights, windows)
        batch = self._batch_statistics(chunks)
        losses, gradients, reports = zip(
            *(self._differentiate(chunk, batch) for chunk in chunks), strict=True
        )
        gradient = torch.cat(gradients)
        if windows is not None:
            gradient = windows.scatter(gradient, height, width)
        one_factor = self.config.normalize is not None and self.config.normalize.over == "batch"
        loss: Tensor = _WithGradient.apply(estimate, torch.cat(losses), gradient, one_factor)
        return LPLOutput(
            loss,
            gradient,
            {
                name: StageReport.concatenate([report[name] for report in reports])
                for name in self.features.stages
            },
        )

    @torch.no_grad()
    def error_maps(self, z0: Tensor, z0_hat: Tensor) -> dict[str, Tensor]:
        """Contribution of every position of ONE whole latent: {stage: (1, H_l, W_l)}, for images.

        Mean over channels, without `crop` and depth weights; statistics over a batch are taken over
        this sample.
        """
        predicted, clean = self.features(z0_hat), self.features(z0)
        batch = self.config.normalize is not None and self.config.normalize.over == "batch"
        maps = {}
        for name in self.features.stages:
            pair = predicted[name], clean[name]
            own = (
                [
                    Statistics.of(x.to(torch.promote_types(x.dtype, torch.float32)), "batch")
                    for x in pair
                ]
                if batch
                else None
            )
            diff = difference(
                self.config, stage_number(name), *pair, None if own is None else (own[0], own[1])
            )
            maps[name] = pointwise(self.config, diff).mean(dim=1)
        return maps

    def omega(self, name: str, upscale: int) -> float:
        """Depth weight of a stage whose features have `upscale` times the latent's side."""
        weights = self.config.depth_weights
        if isinstance(weights, tuple):
            return weights[self.features.stages.index(name)]
        return 1.0 / upscale if weights == "inverse_resolution" else 1.0

    def _chunks(
        self, z0: Tensor, z0_hat: Tensor, weights: Tensor, windows: Windows | None
    ) -> list[_Chunk]:
        size = self.config.chunk_size
        split = [None] * -(-len(z0) // size) if windows is None else windows.split(size)
        return [
            _Chunk(*parts)
            for parts in zip(*(x.split(size) for x in (z0, z0_hat, weights)), split, strict=True)
        ]

    def _batch_statistics(self, chunks: list[_Chunk]) -> dict[str, BatchStatistics]:
        """Collective with `normalize.over: batch`; empty otherwise."""
        normalize = self.config.normalize
        if normalize is None or normalize.over != "batch":
            return {}
        through = normalize.gradient and normalize.source != "target"
        return measure(
            lambda: self._observe(chunks),
            through_statistics=through,
            sum_over_ranks=self.sum_over_ranks,
        )

    def _observe(self, chunks: list[_Chunk]) -> Iterator[StageFeatures]:
        for chunk in chunks:
            hidden = chunk.z0_hat
            clean = chunk.z0
            for name, layer in self.features.named_layers():
                with torch.no_grad():
                    hidden = layer(hidden)
                    clean = layer(clean)
                if name is not None:
                    pair = self._crop(chunk, hidden, clean)
                    yield StageFeatures(
                        name, *pair, chunk.weights, partial(self._loss_under, name, chunk, pair)
                    )

    def _loss_under(
        self, name: str, chunk: _Chunk, pair: tuple[Tensor, Tensor], batch: BatchStatistics
    ) -> Tensor:
        return (self._compare(name, chunk, *pair, batch)[0] * chunk.weights).sum()

    def _differentiate(
        self, chunk: _Chunk, batch: dict[str, BatchStatistics]
    ) -> tuple[Tensor, Tensor, dict[str, StageReport]]:
        """Loss, gradient and reports of one chunk.

        Both branches run stage by stage; each stage is compared, and its gradient taken, before the
        next one runs.
        """
        tape = Tape(recompute=self.config.activation_checkpointing)
        hidden = chunk.z0_hat
        clean = chunk.z0
        loss = torch.zeros_like(chunk.weights)
        reports: dict[str, StageReport] = {}
        for name, layer in self.features.named_layers():
            hidden = tape.run(layer, hidden)
            with torch.no_grad():
                clean = layer(clean)
            if name is not None:
                leaf = hidden.detach().requires_grad_()
                with torch.enable_grad():
                    pair = self._crop(chunk, leaf, clean)
                    contribution, reports[name] = self._compare(name, chunk, *pair, batch.get(name))
                    objective = (contribution * chunk.weights).sum()
                    if name in batch:
                        objective = objective + batch[name].surrogate(pair[0], chunk.weights)
                    tape.inject(*torch.autograd.grad(objective, leaf))
                loss = loss + contribution.detach() * chunk.weights
        return loss, tape.backward(), reports

    def _crop(self, chunk: _Chunk, hidden: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Compared part of both feature maps."""
        if chunk.windows is None:
            return hidden, clean
        return chunk.windows.interior(hidden), chunk.windows.interior(clean)

    def _compare(
        self,
        name: str,
        chunk: _Chunk,
        predicted: Tensor,
        target: Tensor,
        batch: BatchStatistics | None,
    ) -> tuple[Tensor, StageReport]:
        """(K,) contribution of one stage, with gradient at `predicted`, and its report."""
        side = chunk.z0.shape[-1] if chunk.windows is None else chunk.windows.side
        given = None if batch is None else (batch.predicted, batch.target)
        diff = difference(self.config, stage_number(name), predicted, target, given)
        factor = self.omega(name, predicted.shape[-1] // side) / len(self.features.stages)
        contribution = factor * distance(self.config, diff)
        return contribution, StageReport(
            contribution.detach(), diff.keep_fraction(), diff.std_ratio
        )
