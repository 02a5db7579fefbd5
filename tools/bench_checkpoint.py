"""How long training stands still for a checkpoint, and how much slower it is while one is written:
asynchronous against not.

    python tools/bench_checkpoint.py [--rounds 5]
    torchrun --nproc-per-node 2 tools/bench_checkpoint.py --strategy fsdp2

A DiT-S/2 (33 M parameters, AdamW, one average: 16 bytes a parameter are saved) on 32x32 latents;
both kinds of save in turn, each followed by steps until it is published.  Stall: seconds inside
`save`.  Delay: seconds from the save to the end of those steps, less what as many steps take
without one.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lpl_pretrain.checkpoint.manager import CheckpointManager
from lpl_pretrain.config.dataset import LatentEntry
from lpl_pretrain.config.model import DiTConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import CheckpointConfig, EMAConfig, OptimizerConfig, ParallelConfig
from lpl_pretrain.ema.tracker import EMATracker
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.parallel.build import make_strategy, needs_process_group
from lpl_pretrain.runtime import dist
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.optimizer import make_optimizer

LATENT = LatentEntry(channels=4, height=32, width=32, mean=[0.0] * 4, std=[1.0] * 4)
MODEL = DiTConfig(width=384, depth=12, heads=6, patch_size=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="that follow each save")
    parser.add_argument("--strategy", default="local", choices=["local", "ddp", "fsdp2"])
    parser.add_argument("--folder", help="where to write; by default in the temporary folder")
    args = parser.parse_args()
    world, parallel = World.from_environment(), ParallelConfig(strategy=args.strategy)
    device = dist.init(world, group=needs_process_group(parallel))
    model = build_denoiser(MODEL, LATENT, num_classes=1000)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = make_strategy(parallel, world, device)
    denoiser = engine.setup(
        model, model.sharded_blocks(), lambda found: make_optimizer(OptimizerConfig(), found)
    )
    ema = EMATracker(engine.local_params(), EMAConfig())
    z_t, t, labels = (
        torch.randn(2, 4, 32, 32, device=device),
        torch.rand(2, device=device),
        torch.tensor([1, 2], device=device),
    )

    def step() -> None:
        engine.backward(denoiser(z_t, t, Conditioning(labels)).square().mean(), microbatch=0, of=1)
        engine.step(lr=1e-4, max_grad_norm=1.0)
        ema.update(1)

    found: dict[str, list[tuple[float, float]]] = {"synchronous": [], "asynchronous": []}
    folder = Path(dist.broadcast_json(tempfile.mkdtemp(dir=args.folder)))
    keepers = {
        kind: CheckpointManager(
            RunDir(folder / kind),
            CheckpointConfig(asynchronous=kind == "asynchronous", keep_last=1),
        )
        for kind in found
    }
    for number in range(args.rounds + 1):
        for kind, keeper in keepers.items():
            measured = one_save(
                step,
                args.steps,
                lambda keeper=keeper: keeper.save(
                    engine.optimizer_steps, engine, ema, {}, samples_seen=0
                ),
                keeper,
            )
            if number:  # the first round allocates
                found[kind].append(measured)
    if world.rank == 0:
        tell(found, parameters, world)
        shutil.rmtree(folder)
    dist.exit()


def one_save(
    step: Callable[[], None], steps: int, save: Callable[[], object], keeper: CheckpointManager
) -> tuple[float, float]:
    """(stall, delay) in seconds."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    alone = time.perf_counter() - started
    started = time.perf_counter()
    save()
    stall = time.perf_counter() - started
    for _ in range(steps):
        step()
        if not dist.any_over_ranks(keeper.busy)[0]:
            keeper.advance()
    keeper.finish()
    return stall, time.perf_counter() - started - alone


def tell(found: dict[str, list[tuple[float, float]]], parameters: int, world: World) -> None:
    print(
        f"{parameters / 1e6:.1f} M parameters, {16 * parameters / 2**20:.0f} MiB, "
        f"{world.world_size} ranks, medians"
    )
    for kind, values in found.items():
        stalls, delays = zip(*values, strict=True)
        print(
            f"{kind:<13} stall {statistics.median(stalls):6.3f} s   delay "
            f"{statistics.median(delays):6.3f} s"
        )
    ratios = [a[0] / s[0] for a, s in zip(found["asynchronous"], found["synchronous"], strict=True)]
    print(
        f"stall: asynchronous / synchronous {statistics.median(ratios):.3f} ({min(ratios):.3f} to "
        f"{max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
