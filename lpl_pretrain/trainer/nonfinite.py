"""A loss or gradient that was not finite: the update was left out on all ranks; which samples were
it, and does the run go on?
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpl_pretrain.config.base import OnError
from lpl_pretrain.config.schema import OptimizerConfig
from lpl_pretrain.errors import NonFiniteError
from lpl_pretrain.parallel.strategy import StepReport
from lpl_pretrain.runtime.dist import broadcast_json
from lpl_pretrain.runtime.log import log
from lpl_pretrain.runtime.world import World

LISTED = 8


class NonFiniteGuard:
    def __init__(self, config: OptimizerConfig, world: World) -> None:
        self.config, self.world = config, world
        self.skipped_updates = 0
        """In the whole run; an fp16 loss scale that was too large does not count."""

    def judge(
        self, step: int, report: StepReport, samples: list[list[int]], losses: list[Tensor]
    ) -> str | None:
        """Communicates when the update was left out, which all ranks know: says why, or raises
        NonFiniteError on all of them.

        `samples` and `losses` (B,): indices and loss of every sample, by micro-batch, on this rank.
        """
        if report.applied:
            return None
        suspects = self._suspects(samples, losses)
        if report.scale_lowered and not suspects:
            return "the loss was scaled too high for float16; the scale is halved"
        what = (
            f"the loss is not finite: {suspects}"
            if suspects
            else "all losses are finite, the gradient is not"
        )
        why = f"step {step + 1}: {what}"
        self.skipped_updates += 1
        limit = self.config.max_skipped_updates
        if self.config.on_nonfinite is OnError.STOP:
            raise NonFiniteError(
                f"{why}. Parameters and moments are as before this step. Look at these samples, "
                "lower optimizer.lr or raise "
                "optimizer.warmup_steps; optimizer.on_nonfinite=skip leaves such updates out "
                "and goes on"
            )
        if self.skipped_updates > limit:
            raise NonFiniteError(
                f"{why}. This is left-out update number {self.skipped_updates}, "
                f"optimizer.max_skipped_updates is {limit}: "
                "lower optimizer.lr, look at these samples, or raise the limit"
            )
        log.warning("%s; update left out (%d of at most %d)", why, self.skipped_updates, limit)
        return why

    def _suspects(self, samples: list[list[int]], losses: list[Tensor]) -> str:
        """Communicates: `rank 1: samples 17, 23; rank 3: sample 40`, the same text on all ranks;
        empty if all losses are finite.
        """
        finite = torch.cat(losses).isfinite().tolist()
        mine = [index for index, good in zip(sum(samples, []), finite, strict=True) if not good]
        found = {rank: broadcast_json(mine, source=rank) for rank in range(self.world.world_size)}
        return "; ".join(
            f"rank {rank}: {_list(indices)}" for rank, indices in found.items() if indices
        )


def _list(indices: list[int]) -> str:
    more = f" and {len(indices) - LISTED} more" if len(indices) > LISTED else ""
    return f"sample{'s' * (len(indices) > 1)} {', '.join(map(str, sorted(indices)[:LISTED]))}{more}"
