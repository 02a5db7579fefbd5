"""Benchmark activation checkpointing and compilation of DiT blocks: time, FLOPs, peak memory.

    python tools/bench_blocks.py --rounds 5

DiT-S/2 (33 M parameters) on 32x32x4 latents, float32, one process.  Contestants alternate; times
are medians, ratios are of paired rounds.  Peak bytes are counted, above parameters and gradients;
inside compiled code nothing can be counted.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from lpl_pretrain.config.dataset import LatentEntry
from lpl_pretrain.config.model import DiTConfig
from lpl_pretrain.config.schema import ParallelConfig
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.parallel.activation_checkpointing import prepare_blocks
from lpl_pretrain.planning.flops import count_flops
from lpl_pretrain.planning.live_bytes import LiveBytes

LATENT = LatentEntry(channels=4, height=32, width=32, mean=[0.0] * 4, std=[1.0] * 4)
CONTESTANTS: dict[str, dict[str, object]] = {
    "none": {},
    "selective": {"activation_checkpointing": "selective"},
    "every second block": {"activation_checkpointing": "blocks", "checkpoint_every_blocks": 2},
    "every block": {"activation_checkpointing": "blocks"},
    "none, compiled": {"compile": True},
    "every block, compiled": {"activation_checkpointing": "blocks", "compile": True},
}


class Contestant:
    """A model with one setting, its inputs, and the seconds of its timed steps."""

    def __init__(self, options: dict[str, object], batch: int) -> None:
        self.model = build_denoiser(
            DiTConfig(width=384, depth=12, heads=6, patch_size=2), LATENT, num_classes=1000
        )
        prepare_blocks(
            self.model, self.model.sharded_blocks(), ParallelConfig.model_validate(options)
        )
        self.inputs = (
            torch.randn(batch, 4, 32, 32),
            torch.rand(batch),
            Conditioning(torch.arange(batch)),
        )
        self.seconds: list[float] = []

    def step(self) -> None:
        self.model(*self.inputs).output.square().mean().backward()

    def timed(self) -> None:
        started = time.perf_counter()
        self.step()
        self.seconds.append(time.perf_counter() - started)

    def peak_bytes(self) -> int:
        with LiveBytes() as live:
            self.step()
        return live.peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    contestants = {label: Contestant(options, args.batch) for label, options in CONTESTANTS.items()}
    for contestant in contestants.values():
        contestant.step()  # gradients exist, code is compiled
    for _ in range(args.rounds):
        for contestant in contestants.values():
            contestant.timed()
    base = contestants["none"]
    print(f"{'':<24}{'s':>8}{'ratio':>26}{'GFLOP':>10}{'peak MiB':>10}")
    for label, contestant in contestants.items():
        ratios = [
            mine / theirs for mine, theirs in zip(contestant.seconds, base.seconds, strict=True)
        ]
        span = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        counted = f"{'':>10}{'':>10}"
        if not CONTESTANTS[label].get("compile"):
            gflops = count_flops(contestant.step) / 1e9
            counted = f"{gflops:>10.1f}{contestant.peak_bytes() / 2**20:>10.0f}"
        print(f"{label:<24}{statistics.median(contestant.seconds):>8.2f}{span:>26}{counted}")


if __name__ == "__main__":
    main()
