"""LPL as a loss term: the gate, the subset of samples, the weight, and what is logged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lpl_pretrain.config.schema import Prediction
from lpl_pretrain.diffusion.objective import Denoising
from lpl_pretrain.losses.lpl.gate import gate_weights
from lpl_pretrain.losses.lpl.loss import LatentPerceptualLoss
from lpl_pretrain.losses.lpl.panels import LPLSnapshot, draw_panels
from lpl_pretrain.losses.lpl.subset import LPLSubset
from lpl_pretrain.losses.lpl.weight import LPLWeight
from lpl_pretrain.losses.term import Draws, LossTerm, Meter, TermValue
from lpl_pretrain.models.autoencoder import LatentScaling

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class PanelSource:
    """Autoencoder and scaling that decode panels."""

    autoencoder: str
    """Folder of the whole autoencoder, which is loaded for a moment."""
    scaling: LatentScaling


class LPLTerm(LossTerm):
    """LPL of the first `per_microbatch` samples of a microbatch, those of `LPLSubset`."""

    name = "lpl"

    def __init__(
        self,
        loss: LatentPerceptualLoss,
        lpl_weight: LPLWeight,
        subset: LPLSubset,
        *,
        max_noise_level: float,
        prediction: Prediction,
        num_microbatches: int,
        microbatches_per_rank: int,
        flops_per_sample: float,
        panel_source: PanelSource,
        mean_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        """`max_noise_level`: the gate's threshold on sigma_t / alpha_t.  `num_microbatches`: of an
        update, over all ranks.
        """
        self.loss = loss
        self.subset = subset
        self.lpl_weight = lpl_weight
        self.max_noise_level = max_noise_level
        self.prediction = prediction
        self.per_microbatch = subset.per_microbatch(num_microbatches)
        self.snapshot = LPLSnapshot()
        self._inclusion_probability = subset.inclusion_probability
        self._flops = microbatches_per_rank * self.per_microbatch * flops_per_sample
        self._panel_source = panel_source
        self._mean_over_ranks = mean_over_ranks

    def __call__(self, draws: Draws, out: Denoising, meter: Meter) -> TermValue:
        config = self.loss.config
        first = slice(self.per_microbatch)
        noise_level = out.noise_level[first]
        weights = gate_weights(
            noise_level, self.max_noise_level, config.noise_weighting, self.prediction
        )
        weights[draws.num_lpl :] = 0.0
        result = self.loss(
            out.z0[first],
            out.z0_hat[first],
            weights / self._inclusion_probability,
            draws.crop_positions,
        )
        if draws.num_lpl:  # the last microbatches of an update may hold padding alone
            self.snapshot = LPLSnapshot(
                out.z0[first], out.z0_hat[first].detach(), noise_level, weights
            )
        meter.add("lpl/gated_share", (out.noise_level <= self.max_noise_level).float())
        for name, stage in result.stages.items():
            meter.add(f"lpl/stage/{name}/contribution", stage.contribution, weights > 0)
            meter.add(f"lpl/stage/{name}/keep_fraction", stage.keep_fraction, weights > 0)
            meter.add(f"lpl/stage/{name}/std_ratio", stage.std_ratio, weights > 0)
        per_sample = torch.zeros_like(out.mse)
        per_sample[first] = result.loss.detach().to(per_sample)
        return TermValue(result.loss.sum() / len(out.mse), per_sample)

    def active(self, step: int) -> bool:
        return self.lpl_weight.active(step)

    def weight(self, step: int) -> float:
        return self.lpl_weight.value(step)

    def calibrating(self, step: int) -> bool:
        return self.lpl_weight.calibrating(step)

    def calibrate(self, step: int, own: Tensor, others: Tensor) -> float | None:
        means = self._mean_over_ranks(torch.stack([others, own]).double())
        return self.lpl_weight.calibrated if self.lpl_weight.observe(step, means) else None

    def state(self) -> dict[str, Any]:
        return self.lpl_weight.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.lpl_weight.load_state(state)

    def flops_per_update(self) -> float:
        return self._flops

    def panels(self) -> Image | None:
        source = self._panel_source
        return draw_panels(self.loss, self.snapshot, source.autoencoder, source.scaling)
