"""Guard against losses and gradients that are not finite.

The device skips such an update, on all ranks alike.  The host reads later which update it was,
names the samples, and decides whether the run goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_pretrain.config.base import OnError
from lpl_pretrain.config.schema import OptimizerConfig
from lpl_pretrain.errors import NonFiniteError
from lpl_pretrain.parallel.strategy import StepReport
from lpl_pretrain.runtime.dist import broadcast_json
from lpl_pretrain.runtime.log import log
from lpl_pretrain.runtime.world import World

MAX_LISTED = 8


@dataclass(frozen=True, slots=True)
class SkippedUpdate:
    step: int
    """Number of the update, from 1."""
    reason: str


@dataclass(frozen=True, slots=True)
class _Observed:
    step: int
    report: StepReport
    sample_indices: list[int]
    losses: Tensor


class NonFiniteGuard:
    """Collects the reports of updates on the device; `check` reads them all at once.

    After more skipped updates than allowed (with on_nonfinite=stop: after one) the device refuses
    every further update until the host has read about it, so parameters and moments stay as they
    were before the fault.
    """

    def __init__(self, config: OptimizerConfig, world: World, device: torch.device) -> None:
        self.config = config
        self.world = world
        self.skipped_updates = 0
        """Skipped updates of the whole run; those of a too large fp16 loss scale do not count."""
        self.refuse = torch.zeros((), dtype=torch.bool, device=device)
        """() bool: the next update is refused, whatever its gradient."""
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._observed: list[_Observed] = []

    @property
    def limit(self) -> int:
        """Skipped updates that a run may have."""
        if self.config.on_nonfinite is OnError.STOP:
            return 0
        return self.config.max_skipped_updates

    def observe(
        self, step: int, report: StepReport, sample_indices: list[int], losses: Tensor
    ) -> None:
        """Keep the report of update number `step` (from 0) for `check`; the host does not wait.

        `losses` (B,) of this rank's samples `sample_indices` (B).
        """
        self._skipped += ~report.applied & ~report.scale_lowered
        self.refuse = self._skipped > self.limit
        self._observed.append(_Observed(step, report, sample_indices, losses))

    def check(self) -> list[SkippedUpdate]:
        """Collective. Read the reports since the last call: the updates that were skipped.

        One copy to the host, and nothing more if all updates were applied.  Raises NonFiniteError
        on all ranks.
        """
        observed = self._observed
        self._observed = []
        if not observed:
            return []
        applied = torch.stack([one.report.applied for one in observed]).tolist()
        skipped = [
            one for one, was_applied in zip(observed, applied, strict=True) if not was_applied
        ]
        updates = [SkippedUpdate(one.step + 1, self._reason(one)) for one in skipped]
        self._skipped.fill_(self.skipped_updates)
        return updates

    def restore(self, skipped_updates: int) -> None:
        """Continue from a checkpoint's count; reports that were not read are forgotten."""
        self.skipped_updates = skipped_updates
        self._skipped.fill_(skipped_updates)
        self.refuse.fill_(False)
        self._observed = []

    def _reason(self, one: _Observed) -> str:
        """Collective. Why an update was skipped.  Raises NonFiniteError on all ranks."""
        suspects = self._suspects(one)
        if not suspects and bool(one.report.scale_lowered):
            return "the loss was scaled too high for float16; the scale is halved"
        what = "all losses are finite, the gradient is not"
        if suspects:
            what = f"the loss is not finite: {suspects}"
        why = f"step {one.step + 1}: {what}"
        self.skipped_updates += 1
        limit = self.config.max_skipped_updates
        if self.config.on_nonfinite is OnError.STOP:
            raise NonFiniteError(
                f"{why}. Parameters and moments are as before this step. Look at these samples, "
                "lower optimizer.lr or raise optimizer.warmup_steps; optimizer.on_nonfinite=skip "
                "skips such updates and goes on"
            )
        if self.skipped_updates > limit:
            raise NonFiniteError(
                f"{why}. This is skipped update number {self.skipped_updates}, "
                f"optimizer.max_skipped_updates is {limit}: lower optimizer.lr, look at these "
                "samples, or raise the limit"
            )
        log.warning("%s; update skipped (%d of at most %d)", why, self.skipped_updates, limit)
        return why

    def _suspects(self, one: _Observed) -> str:
        """Collective. `rank 1: samples 17, 23; rank 3: sample 40`, the same text on all ranks;
        empty if all losses are finite.
        """
        finite = one.losses.isfinite().tolist()
        bad = [index for index, good in zip(one.sample_indices, finite, strict=True) if not good]
        by_rank = {rank: broadcast_json(bad, source=rank) for rank in range(self.world.world_size)}
        return "; ".join(
            f"rank {rank}: {_listed(indices)}" for rank, indices in by_rank.items() if indices
        )


def _listed(indices: list[int]) -> str:
    more = f" and {len(indices) - MAX_LISTED} more" if len(indices) > MAX_LISTED else ""
    shown = ", ".join(map(str, sorted(indices)[:MAX_LISTED]))
    return f"sample{'s' * (len(indices) > 1)} {shown}{more}"
