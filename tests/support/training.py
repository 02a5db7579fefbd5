"""Training of the tiny denoiser under any strategy, to compare strategies and world sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpl_pretrain.config.schema import EMAConfig, OptimizerConfig, ParallelConfig
from lpl_pretrain.ema.tracker import EMATracker
from lpl_pretrain.parallel.build import make_strategy
from lpl_pretrain.parallel.strategy import ParamRange, StepReport, Strategy
from lpl_pretrain.runtime.dist import mean_over_ranks
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.optimizer import make_optimizer
from tests.support.tiny_denoiser import BLOCKS, GLOBAL_BATCH, batch, tiny_denoiser

ROOT = Path(__file__).parents[2]
ZERO_CONFIGS = {
    "zero0": "configs/zero/zero0.json",
    "zero1": "configs/zero/zero1.json",
    "zero2": "configs/zero/zero2.json",
    # the shipped one keeps parameters this small whole on every rank
    "zero3": "tests/support/zero3_partitioned.json",
    "zero3_shipped": "configs/zero/zero3.json",
    "zero2_offload": "configs/zero/zero2_offload.json",
    "zero3_offload": "tests/support/zero3_partitioned_offload.json",
    "zero3_offload_shipped": "configs/zero/zero3_offload.json",
}
NO_CLIPPING = 1e9
HISTORIES = {"norms", "losses"}
"""Kinds of result that are series over steps, of the global batch."""
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: make_optimizer(OptimizerConfig(kind="sgd", lr=1.0), params),
    "adamw": lambda params: torch.optim.AdamW(
        params.values(), lr=1.0, weight_decay=0.1, fused=True
    ),
    "muon": lambda params: make_optimizer(
        OptimizerConfig(kind="muon", lr=1.0, weight_decay=0.1), params, BLOCKS
    ),
}


@dataclass(frozen=True)
class Case:
    strategy: str = "local"  # or a key of JSON_OF
    precision: str = "fp64"
    optimizer: str = "sgd"
    grad_accum_steps: int = 1
    max_grad_norm: float = NO_CLIPPING
    lr: float = 0.1
    ema_decay: float = 0.9
    more: tuple[tuple[str, Any], ...] = ()  # more keys of ParallelConfig

    def config(self) -> ParallelConfig:
        raw = {"strategy": self.strategy, "precision": self.precision, **dict(self.more)}
        if self.strategy in ZERO_CONFIGS:
            raw |= {"strategy": "zero", "zero_config": str(ROOT / ZERO_CONFIGS[self.strategy])}
        return ParallelConfig.model_validate(raw)


class Training:
    """One training run: `strategy`, `ema`, and `step`, the number of updates made."""

    def __init__(self, world: World, device: torch.device, case: Case, *, seed: int = 0) -> None:
        self.world = world
        self.case = case
        self.step = 0
        self.strategy: Strategy = make_strategy(case.config(), world, device)
        # ranks begin with different weights on purpose: setup must make them rank 0's
        self.module = self.strategy.setup(
            tiny_denoiser(seed + world.rank), BLOCKS, OPTIMIZERS[case.optimizer]
        )
        self.ema = EMATracker(
            self.strategy.local_params(), EMAConfig(decay=case.ema_decay, sigma_rel=(0.05, 0.1))
        )
        self.norms: list[float] = []
        self.losses: list[float] = []

    def train(self, steps: int) -> Training:
        for _ in range(steps):
            self.norms.append(self.update().grad_norm.item())
            self.step += 1
            self.ema.update(self.step)
        return self

    def update(
        self, change_loss: Callable[[Tensor, int], Tensor] = lambda loss, microbatch: loss
    ) -> StepReport:
        """Make one update on the data of the next step; `change_loss` may replace a loss."""
        total = torch.zeros((), dtype=torch.float64, device=self.strategy.device)
        for microbatch in range(self.case.grad_accum_steps):
            loss = change_loss(self._loss(microbatch), microbatch)
            self.strategy.backward(loss, microbatch=microbatch, of=self.case.grad_accum_steps)
            total += loss.detach().double() / self.case.grad_accum_steps
        self.losses.append(mean_over_ranks(total).item())
        return self.strategy.step(lr=self.case.lr, max_grad_norm=self.case.max_grad_norm)

    def result(self) -> dict[str, Any]:
        """State that this rank owns, in types that a rank may return to its parent process."""
        pieces = {"param": list(self.strategy.local_params())}
        for kind, piece in self.ema.local_averages():
            pieces.setdefault(kind, []).append(piece)
        for name, piece in self.strategy.local_optimizer_state():
            pieces.setdefault(f"optimizer.{name}", []).append(piece)
        sent = {
            kind: [(p.name, list(p.shape), p.start, p.tensor.clone()) for p in some]
            for kind, some in pieces.items()
        }
        return {
            "pieces": sent,
            "norms": self.norms,
            "losses": self.losses,
            "optimizer_steps": self.strategy.optimizer_steps,
        }

    def _loss(self, microbatch: int) -> Tensor:
        per_rank = GLOBAL_BATCH // self.world.world_size // self.case.grad_accum_steps
        first = (microbatch * self.world.world_size + self.world.rank) * per_rank
        z_t, t, cond, target = batch(
            self.step, range(first, first + per_rank), self.strategy.device
        )
        master_dtype = self.strategy.precision.master
        return (
            (self.module(z_t, t, cond).to(master_dtype) - target.to(master_dtype)).square().mean()
        )


def set_loss_scale(strategy: Strategy, value: float) -> None:
    """Start fp16 at another loss scale."""
    strategy.loss_scale.load_state({"value": value, "dynamic": True, "good_updates": 0})


def train(world: World, device: torch.device, case: Case, steps: int = 3) -> dict[str, Any]:
    return Training(world, device, case).train(steps).result()


def train_one_process(case: Case, steps: int = 3) -> dict[str, dict[str, Tensor]]:
    """Train in this process: parameters, EMA and moments, gradient norms as "norms"."""
    return join_ranks([train(World(), torch.device("cpu"), case, steps)])


@cache
def reference(case: Case, steps: int = 3) -> dict[str, dict[str, Tensor]]:
    """`train_one_process`, computed once in this process; the tensors must not be changed."""
    return train_one_process(case, steps)


def join_ranks(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """Join all ranks' results to {kind: {name: full tensor}}.

    Fails unless the ranks' ranges tile every parameter and their histories agree.
    """
    results = list(results)
    assert all(result["norms"] == results[0]["norms"] for result in results), (
        "ranks disagree about the gradient norm"
    )
    by_kind: dict[str, dict[str, list[ParamRange]]] = {}
    for result in results:
        for kind, pieces in result["pieces"].items():
            for name, shape, start, tensor in pieces:
                by_kind.setdefault(kind, {}).setdefault(name, []).append(
                    ParamRange(name, tuple(shape), start, tensor)
                )
    joined = {
        kind: {name: _join(pieces) for name, pieces in named.items()}
        for kind, named in by_kind.items()
    }
    histories = {kind: results[0][kind] for kind in HISTORIES if kind in results[0]}
    return {
        **joined,
        **{
            kind: {kind: torch.tensor(values, dtype=torch.float64)}
            for kind, values in histories.items()
        },
    }


def assert_identical(
    got: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]
) -> None:
    """Compare states bit for bit; histories are not part of the state."""
    assert got.keys() == wanted.keys()
    for kind in wanted.keys() - HISTORIES:
        assert got[kind].keys() == wanted[kind].keys()
        different = [
            name
            for name, tensor in wanted[kind].items()
            if not torch.equal(got[kind][name], tensor)
        ]
        assert not different, f"{kind}: {different} differ"


def _join(pieces: list[ParamRange]) -> Tensor:
    pieces = sorted(pieces, key=lambda piece: piece.start)
    ends = [0, *(piece.stop for piece in pieces)]
    assert [piece.start for piece in pieces] == ends[:-1], f"{pieces[0].name}: pieces do not tile"
    return torch.cat([piece.tensor for piece in pieces]).reshape(pieces[0].shape)
