"""Variance of a gated batch mean: stratified, planned t against independent t for every sample.

    python tools/bench_batch_plan.py

The quantity is the mean over a batch of gate * (0.2 + noise level), a stand-in for LPL whose only
randomness is t: rectified flow, logit-normal t, `snr_above: 3`.  `sample_fraction` decodes that
fraction of the gated samples, weighted by its inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.config.schema import ScheduleKind, TimestepConfig
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.diffusion.timesteps import quantile
from lpl_pretrain.losses.lpl.gate import gate_fraction
from lpl_pretrain.losses.lpl.subset import LPLSubset
from lpl_pretrain.trainer.batch_plan import BatchPlanner


class Estimator:
    """Batch means of the gated quantity under both ways to draw t."""

    def __init__(self, threshold: float = 3**-0.5, size: int = 32) -> None:
        self.threshold = threshold
        self.size = size
        self.schedule = make_schedule(ScheduleKind.RECTIFIED_FLOW)
        self.timesteps = TimestepConfig(distribution="logit_normal")
        self.gated_fraction = gate_fraction(threshold, self.schedule, self.timesteps)

    def value(self, t: Tensor) -> Tensor:
        noise_level = self.schedule.noise_level(t)
        return (noise_level <= self.threshold) * (0.2 + noise_level)

    def plain(self, draws: int) -> Tensor:
        """Independent t for every sample: (draws // size,) batch means."""
        uniform = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        t = quantile(self.timesteps, uniform)
        return self.value(t).view(-1, self.size).mean(dim=1)

    def planned(self, draws: int, sample_fraction: float, *, weighted: bool = True) -> Tensor:
        """t of `BatchPlanner`, as in training: (draws // size,) batch means."""
        subset = LPLSubset.of(self.size, self.gated_fraction, sample_fraction)
        planner = BatchPlanner(0, self.size, self.timesteps, self.schedule, subset)
        means = []
        for step in range(draws // self.size):
            (microbatch,) = planner.plan(step, 1)
            value = self.value(microbatch.t.double()[: microbatch.num_lpl]).sum()
            means.append(value / (subset.inclusion_probability if weighted else 1.0) / self.size)
        return torch.stack(means)


def main() -> None:
    print("batch  sample_fraction  mean, plain  mean, planned  variance, plain / planned")
    for size, draws in ((32, 100_000), (256, 400_000)):
        estimator = Estimator(size=size)
        plain = estimator.plain(3_200_000)
        for fraction in (1.0, 0.5, 0.25):
            planned = estimator.planned(draws, fraction)
            print(
                f"{size:5}  {fraction:12}  {plain.mean():11.4f}  {planned.mean():13.4f}  "
                f"{plain.var() / planned.var():25.1f}"
            )


if __name__ == "__main__":
    main()
