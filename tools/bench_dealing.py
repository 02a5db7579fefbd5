"""How much less a gated batch mean varies when t is stratified and dealt out than when every sample
draws its own.

    python tools/bench_dealing.py

The quantity is the mean over a batch of gate * (0.2 + noise level), a stand-in for LPL whose only
randomness is t: rectified flow, logit-normal t, `min_snr: 3`.  `sample_share` decodes that share of
the gated samples, weighted by its inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.config.schema import ScheduleKind, TimestepConfig
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.diffusion.timesteps import quantile
from lpl_pretrain.losses.lpl.gate import gate_share
from lpl_pretrain.trainer.batch_plan import BatchPlanner, LPLSubset


class Estimator:
    def __init__(self, threshold: float = 3**-0.5, size: int = 32) -> None:
        self.threshold, self.size = threshold, size
        self.schedule, self.timesteps = (
            make_schedule(ScheduleKind.RECTIFIED_FLOW),
            TimestepConfig(distribution="logit_normal"),
        )
        self.share = gate_share(threshold, self.schedule, self.timesteps)

    def value(self, t: Tensor) -> Tensor:
        level = self.schedule.noise_level(t)
        return (level <= self.threshold) * (0.2 + level)

    def plain(self, draws: int) -> Tensor:
        """Independent t for every sample: (draws // size,) batch means."""
        t = quantile(
            self.timesteps,
            torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        )
        return self.value(t).view(-1, self.size).mean(dim=1)

    def dealt(self, draws: int, sample_share: float, *, weighted: bool = True) -> Tensor:
        """As training draws it: (draws // size,) batch means."""
        choice = LPLSubset.of(self.size, self.share, sample_share)
        dealer = BatchPlanner(0, self.size, self.timesteps, self.schedule, choice)
        means = []
        for step in range(draws // self.size):
            (hand,) = dealer.deal(step, 1)
            value = self.value(hand.t.double()[: hand.chosen]).sum()
            means.append(value / (choice.inclusion if weighted else 1.0) / self.size)
        return torch.stack(means)


def main() -> None:
    print("batch  sample_share  mean, plain  mean, dealt  variance, plain / dealt")
    for size, draws in ((32, 100_000), (256, 400_000)):
        estimator = Estimator(size=size)
        plain = estimator.plain(3_200_000)
        for share in (1.0, 0.5, 0.25):
            dealt = estimator.dealt(draws, share)
            print(
                f"{size:5}  {share:12}  {plain.mean():11.4f}  {dealt.mean():11.4f}  "
                f"{plain.var() / dealt.var():23.1f}"
            )


if __name__ == "__main__":
    main()
