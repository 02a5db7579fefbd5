"""Spike detection: a finite gradient norm or loss far above those of the last updates is rejected
before the update, on all ranks alike.

Spikes come from the combination of certain batches with a certain state of the parameters: a run
restarted from an earlier checkpoint without those batches does not have them (PaLM,
arXiv 2204.02311, section 5.1).

Watched quantities: the norm of the global gradient before clipping, and the mean squared error of
each noise level, which holds an equal part of the timestep distribution; the mean over all levels
would hide a spike at one of them.  Both are positive with heavy tails, so their logarithms are
compared: a value is a spike when

    log(value) > median + max(threshold_mads * 1.4826 * MAD, log(min_factor))

with median and MAD (the median distance from the median) of the logarithms in the window of the
last applied updates.  1.4826 * MAD estimates a standard deviation, and no single value moves it
much; the z-score of ZClip (arXiv 2504.02507) on the norm is the same idea with mean and variance.
A trend does not reach the bound, for it widens the MAD.  A rejected update does not enter the
window.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from lpl_pretrain.config.schema import SpikeConfig, TimestepConfig
from lpl_pretrain.diffusion.schedule import Schedule
from lpl_pretrain.diffusion.timesteps import quantile
from lpl_pretrain.parallel.strategy import StepReport, UpdateCheck
from lpl_pretrain.runtime.dist import all_gather_rows

MAD_TO_STD = 1.4826
"""Standard deviation of a normal distribution over its MAD."""
DIGITS = 6
"""Decimals of the stored logarithms: a millionth of a value, exact in JSON."""
MAX_LISTED = 8
Location = tuple[int, int, int]
"""(folder, shard, row) of a stored sample."""
LogValues = list[Optional[float]]
"""Logarithms of one update: of the gradient norm, then of the loss at each noise level; None: no
value.
"""


@dataclass(frozen=True)
class Bound:
    """Bound of one quantity; both numbers are logarithms."""

    median: float
    largest: float


@dataclass(frozen=True)
class NoiseLevels:
    """Equal parts of the timestep distribution, from little noise to much."""

    t: list[float]  # (K + 1,) from 0 to 1
    edges: Tensor  # (K - 1,) noise levels sigma / alpha between them, ascending

    @classmethod
    def of(cls, count: int, timesteps: TimestepConfig, schedule: Schedule) -> NoiseLevels:
        u = torch.arange(1, count, dtype=torch.float64) / count
        t = schedule.snap(quantile(timesteps, u).float())
        return cls([0.0, *t.tolist(), 1.0], schedule.noise_level(t))

    @property
    def count(self) -> int:
        return len(self.t) - 1

    def index(self, noise_level: Tensor) -> Tensor:
        """(B,) sigma / alpha -> (B,) int64, on the device of both."""
        return torch.bucketize(noise_level, self.edges.to(noise_level), right=True)

    def sums(self, noise_level: Tensor, losses: Tensor) -> Tensor:
        """(2 K,) float64: the sum of `losses` (B,) at each level, then the number of samples at
        each.
        """
        numbers = torch.arange(self.count, device=losses.device)[:, None]
        inside = self.index(noise_level) == numbers
        sums = torch.where(inside, losses.double(), 0.0).sum(dim=1)
        return torch.cat([sums, inside.sum(dim=1).double()])

    def name(self, level: int) -> str:
        return f"t {self.t[level]:.3g} to {self.t[level + 1]:.3g}"


@dataclass(frozen=True)
class Spike:
    """A rejected update; equal on all ranks."""

    step: int  # number of the update, from 1
    quantity: str
    value: float
    median: float
    bound: float
    samples: list[str]  # with the largest losses for their noise levels

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.quantity} is {self.value:.4g}, bound {self.bound:.4g} "
            f"(median {self.median:.4g}); largest losses: {', '.join(self.samples)}"
        )


class SpikeGuard:
    """Watches one run."""

    def __init__(
        self,
        config: SpikeConfig,
        levels: NoiseLevels,
        device: torch.device,
        location_name: Callable[[Location], str] = str,
    ) -> None:
        """`location_name` names a stored sample in messages."""
        self.config = config
        self.location_name = location_name
        self.levels = NoiseLevels(levels.t, levels.edges.to(device))
        self.events = 0
        """Spikes of the whole run; a rollback does not lower the number."""
        self.rows: deque[LogValues] = deque(maxlen=config.window_updates)
        self.terms: list[str] | None = None
        """Loss terms that had a weight in the window's updates; with others a new window starts."""
        self._noise_levels: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._bounds: list[Bound | None] = []
        self._row: LogValues = []

    def observe(self, noise_level: Tensor, losses: Tensor) -> None:
        """Squared errors (B,) of one microbatch at `noise_level` (B,); both stay on the device."""
        self._noise_levels.append(noise_level)
        self._losses.append(losses)

    def check(self, *, terms: list[str]) -> UpdateCheck:
        """Check of the update whose microbatches were observed; the host does not wait here.

        `terms`: names of the loss terms that have a weight in it.
        """
        if terms != self.terms:
            self.rows.clear()
        self.terms = terms
        self._bounds = bounds(self.rows, self.config, columns=1 + self.levels.count)
        noise_level = torch.cat(self._noise_levels)
        losses = torch.cat(self._losses)
        self._noise_levels = [noise_level]
        self._losses = [losses]
        return UpdateCheck(self.levels.sums(noise_level, losses), self._accept)

    def judge(
        self,
        step: int,
        report: StepReport,
        samples: Sequence[int],
        locations: Sequence[Location],
    ) -> Spike | None:
        """Spike of update number `step` (from 0); None when it was not rejected.

        Collective when it was rejected.  `samples` and `locations`: of the observed losses of this
        rank.
        """
        (noise_level,) = self._noise_levels
        (losses,) = self._losses
        self._noise_levels = []
        self._losses = []
        if not report.rejected:
            return None
        column = worst(self._row, self._bounds)
        assert column is not None
        self.events += 1
        return self._spike(step, column, self._suspects(noise_level, losses, samples, locations))

    def state(self) -> dict[str, Any]:
        return {"events": self.events, "terms": self.terms, "window": list(self.rows)}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Restore what `state` returned; None: a checkpoint of a run without spike detection.

        Another number of noise levels starts a new window.
        """
        state = state or {"events": 0, "terms": None, "window": []}
        self.events = state["events"]
        self.terms = state["terms"]
        self.rows.clear()
        self.rows.extend(row for row in state["window"] if len(row) == 1 + self.levels.count)

    def _accept(self, norm: float, sums: list[float]) -> bool:
        totals = sums[: self.levels.count]
        counts = sums[self.levels.count :]
        means = [total / n if n else math.nan for total, n in zip(totals, counts, strict=True)]
        self._row = [logarithm(value) for value in (norm, *means)]
        accepted = worst(self._row, self._bounds) is None
        if accepted:
            self.rows.append(self._row)
        return accepted

    def _spike(self, step: int, column: int, samples: list[str]) -> Spike:
        bound = self._bounds[column]
        value = self._row[column]
        assert bound is not None and value is not None
        quantity = f"the loss at {self.levels.name(column - 1)}" if column else "the gradient norm"
        return Spike(
            step + 1,
            quantity,
            value=math.exp(value),
            median=math.exp(bound.median),
            bound=math.exp(bound.largest),
            samples=samples,
        )

    def _suspects(
        self,
        noise_level: Tensor,
        losses: Tensor,
        samples: Sequence[int],
        locations: Sequence[Location],
    ) -> list[str]:
        """Collective. Samples of the global batch whose losses exceed their medians most."""
        medians = [0.0 if bound is None else bound.median for bound in self._bounds[1:]]
        usual = torch.tensor(medians, dtype=torch.float64)[self.levels.index(noise_level).cpu()]
        excess = losses.double().cpu().log() - usual
        order = torch.argsort(excess, descending=True)[:MAX_LISTED].tolist()
        rows = torch.full((MAX_LISTED, 5), -torch.inf, dtype=torch.float64)
        for row, i in zip(rows, order, strict=False):
            row[:] = torch.tensor([excess[i], samples[i], *locations[i]], dtype=torch.float64)
        gathered = all_gather_rows(rows.flatten()).view(-1, 5).tolist()
        largest = sorted(gathered, key=lambda row: (-row[0], row[1]))[:MAX_LISTED]
        listed = [[int(number) for number in row[1:]] for row in largest if row[1] >= 0]
        return [
            f"sample {i} ({self.location_name((folder, shard, row))})"
            for i, folder, shard, row in listed
        ]


def bounds(rows: Sequence[LogValues], config: SpikeConfig, *, columns: int) -> list[Bound | None]:
    """Bound of each column; None while fewer than `min_updates` values are known."""
    if len(rows) < config.min_updates:
        return [None] * columns
    limits: list[Bound | None] = []
    for column in np.array(rows, dtype=np.float64).T:
        known = column[~np.isnan(column)]
        if len(known) < config.min_updates:
            limits.append(None)
            continue
        median = float(np.median(known))
        deviation = MAD_TO_STD * float(np.median(np.abs(known - median)))
        above = max(config.threshold_mads * deviation, math.log(config.min_factor))
        limits.append(Bound(median, median + above))
    return limits


def worst(row: Sequence[float | None], limits: Sequence[Bound | None]) -> int | None:
    """Index of the column that exceeds its bound most; None when none does."""
    excess = [
        -math.inf if value is None or bound is None else value - bound.largest
        for value, bound in zip(row, limits, strict=True)
    ]
    largest = max(excess)
    return excess.index(largest) if largest > 0 else None


def logarithm(value: float) -> float | None:
    """Rounded logarithm; None for a value without one (NaN: no sample; a gradient of zero)."""
    return round(math.log(value), DIGITS) if 0 < value < math.inf else None
