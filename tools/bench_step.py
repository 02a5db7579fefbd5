"""Benchmark a training step against a bare PyTorch loop with the same model and optimizer.

    python tools/bench_step.py --config configs/train/emoji_dit.yaml --rounds 8 --steps 20

Bare: latents in memory, torch.randn noise, autocast, backward, clipping, AdamW, EMA.  Ours: all
that `train` does in a step: reading shards, keyed draws, batch planning, metrics, strategy, EMA.
Both alternate in one process; the ratio is the median over rounds.  Both run after the process
group's start, which on a CPU keeps freed memory from returning to the system.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lpl_pretrain.config.load import load_config
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import Precision, TrainConfig
from lpl_pretrain.models.autoencoder import sample_posterior
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import class_conditioning
from lpl_pretrain.runtime import dist
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import Run, assemble
from lpl_pretrain.trainer.metrics import Meter
from lpl_pretrain.trainer.optimizer import make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/train/emoji_dit.yaml")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="steps of each loop in each round")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = load_config(TrainConfig, args.config, args.overrides)
    with TemporaryDirectory() as scratch:
        device = dist.init(World())
        run = assemble(config, RunDir(Path(scratch)), World(), device)
        loops = {"bare": bare_loop(run), "ours": our_loop(run)}
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for round_number in range(args.rounds + 1):
            for name, loop in loops.items():
                elapsed = timed(loop, args.steps, device)
                if round_number:  # the first round warms up
                    seconds[name].append(elapsed / args.steps)
    for name, values in seconds.items():
        print(
            f"{name}  {1 / statistics.median(values):8.3f} steps/s   median "
            f"{1000 * statistics.median(values):8.1f} ms   min {1000 * min(values):8.1f} ms   max "
            f"{1000 * max(values):8.1f} ms"
        )
    ratios = [ours / bare for ours, bare in zip(seconds["ours"], seconds["bare"], strict=True)]
    print(
        f"ours / bare: median {statistics.median(ratios):.4f}, from {min(ratios):.4f} to "
        f"{max(ratios):.4f}, {len(ratios)} rounds"
    )


def bare_loop(run: Run) -> Callable[[int], None]:
    config = run.config
    batch = run.stream.read(range(config.batch.global_batch_size)).to(run.device)
    model = build_denoiser(config.model, run.stream.index.latent, run.updater.num_classes).to(
        run.device
    )
    optimizer = make_optimizer(
        config.optimizer, dict(model.named_parameters()), model.sharded_blocks()
    )
    average = [p.detach().clone() for p in model.parameters()]
    cond = class_conditioning(batch.labels, run.updater.num_classes)

    def loop(steps: int) -> None:
        for _ in range(steps):
            z0 = run.updater.scaling.normalize(
                sample_posterior(batch.moments, torch.randn_like(batch.moments[:, ::2]))
            )
            eps, t = torch.randn_like(z0), torch.sigmoid(torch.randn(len(z0), device=run.device))
            z_t = torch.lerp(z0, eps, t.view(-1, 1, 1, 1))
            with torch.autocast(
                run.device.type, torch.bfloat16, enabled=config.parallel.precision is Precision.BF16
            ):
                out = model(z_t, t, cond).output
            (out.float() - (eps - z0)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(
                average, [p.detach() for p in model.parameters()], 1 - config.ema.decay
            )

    return loop


def our_loop(run: Run) -> Callable[[int], None]:
    meter = Meter(run.device)
    clock = Clock(run.device)
    batches = run.batches(0)
    step = iter(range(run.config.steps))

    def loop(steps: int) -> None:
        for number in islice(step, steps):
            run.updater.update(number, list(islice(batches, run.grad_accum_steps)), meter, clock)
            run.ema.update(number + 1)
        run.updater.skipped_updates()
        meter.flush()
        clock.flush()

    return loop


def timed(loop: Callable[[int], None], steps: int, device: torch.device) -> float:
    started = time.perf_counter()
    loop(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
