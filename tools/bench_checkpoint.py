"""Benchmark checkpoints: how long `save` blocks training and slows it, asynchronous or not.

    python tools/bench_checkpoint.py [--rounds 5]
    torchrun --nproc-per-node 2 tools/bench_checkpoint.py --strategy fsdp2

A DiT-S/2 (33 M parameters, AdamW, one average: 16 bytes a parameter are saved) on 32x32 latents;
both kinds of save alternate, each followed by steps until it is published.  Stall: seconds inside
`save`.  Delay: seconds from the save to the end of those steps, minus the time of as many steps
without a save.
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
    parser.add_argument("--steps", type=int, default=20, help="steps after each save")
    parser.add_argument("--strategy", default="local", choices=["local", "ddp", "fsdp2"])
    parser.add_argument("--folder", help="folder to write to (default: a temporary one)")
    args = parser.parse_args()
    world = World.from_environment()
    parallel = ParallelConfig(strategy=args.strategy)
    device = dist.init(world, group=needs_process_group(parallel))
    model = build_denoiser(MODEL, LATENT, num_classes=1000)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = make_strategy(parallel, world, device)
    denoiser = engine.setup(
        model, model.sharded_blocks(), lambda params: make_optimizer(OptimizerConfig(), params)
    )
    ema = EMATracker(engine.local_params(), EMAConfig())
    z_t = torch.randn(2, 4, 32, 32, device=device)
    t = torch.rand(2, device=device)
    labels = torch.tensor([1, 2], device=device)

    def step() -> None:
        output = denoiser(z_t, t, Conditioning(labels)).output
        engine.backward(output.square().mean(), microbatch=0, of=1)
        engine.step(lr=1e-4, max_grad_norm=1.0)
        ema.update(1)

    timings: dict[str, list[tuple[float, float]]] = {"synchronous": [], "asynchronous": []}
    folder = Path(dist.broadcast_json(tempfile.mkdtemp(dir=args.folder)))
    managers = {
        kind: CheckpointManager(
            RunDir(folder / kind),
            CheckpointConfig(asynchronous=kind == "asynchronous", keep_last=1),
        )
        for kind in timings
    }
    for number in range(args.rounds + 1):
        for kind, manager in managers.items():
            measured = measure_save(
                step,
                args.steps,
                lambda manager=manager: manager.save(
                    engine.optimizer_steps, engine, ema, {}, samples_seen=0
                ),
                manager,
            )
            if number:  # the first round allocates
                timings[kind].append(measured)
    if world.rank == 0:
        print_timings(timings, parameters, world)
        shutil.rmtree(folder)
    dist.exit()


def measure_save(
    step: Callable[[], None], steps: int, save: Callable[[], object], manager: CheckpointManager
) -> tuple[float, float]:
    """Save once while training: (stall, delay) in seconds."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    steps_s = time.perf_counter() - started
    started = time.perf_counter()
    save()
    stall = time.perf_counter() - started
    for _ in range(steps):
        step()
        if not dist.any_over_ranks(manager.busy)[0]:
            manager.advance()
    manager.finish()
    return stall, time.perf_counter() - started - steps_s


def print_timings(
    timings: dict[str, list[tuple[float, float]]], parameters: int, world: World
) -> None:
    print(
        f"{parameters / 1e6:.1f} M parameters, {16 * parameters / 2**20:.0f} MiB, "
        f"{world.world_size} ranks, medians"
    )
    for kind, values in timings.items():
        stalls, delays = zip(*values, strict=True)
        print(
            f"{kind:<13} stall {statistics.median(stalls):6.3f} s   delay "
            f"{statistics.median(delays):6.3f} s"
        )
    ratios = [
        a[0] / s[0] for a, s in zip(timings["asynchronous"], timings["synchronous"], strict=True)
    ]
    print(
        f"stall: asynchronous / synchronous {statistics.median(ratios):.3f} ({min(ratios):.3f} to "
        f"{max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
