"""Benchmark LPL against its public implementation, on the same decoder and inputs.

    python tools/bench_lpl.py --published lpl_loss.py

`--published` is `examples/research_projects/lpl/lpl_loss.py` of huggingface/diffusers, not part of
this project.  It runs with the options that its README recommends (shared normalisation, power law,
outliers removed, gradient checkpointing on).  Ours runs with the preset that computes the same
numbers, then with a bf16 decoder, then as the paper's loss.  The decoder has the shape of SD's,
random weights and no `post_quant_conv`, which the public implementation skips.  Rows alternate.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.losses.lpl.features import DTYPES, DecoderFeatures
from lpl_pretrain.losses.lpl.loss import LatentPerceptualLoss
from lpl_pretrain.models.autoencoder import LatentScaling, decoder_stages
from lpl_pretrain.planning.live_bytes import LiveBytes
from lpl_pretrain.runtime.device import bf16_is_native

SD = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
Run = Callable[[], tuple[Tensor, Tensor]]  # loss (K,), gradient (K, C, H, W)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--published",
        help="path of lpl_loss.py; without it only our rows run, and the first is the reference",
    )
    parser.add_argument("--samples", type=int, default=8, help="gated samples")
    parser.add_argument("--latent", type=int, default=16, help="side of the latents")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="timed rounds, after one warm-up",
    )
    parser.add_argument("--chunk-size", type=int, default=1, help="lpl.chunk_size of our rows")
    parser.add_argument(
        "--compile", action="store_true", help="add our rows with compiled decoder pieces"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    rows = measure(make_runs(args), args.rounds, args.device)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def make_runs(args: argparse.Namespace) -> dict[str, Run]:
    torch.manual_seed(0)
    levels = len(SD["block_out_channels"])
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    network = (
        AutoencoderKL(**SD, **blocks, use_post_quant_conv=False, use_quant_conv=False)
        .eval()
        .requires_grad_(False)
    )
    z0 = torch.randn(args.samples, SD["latent_channels"], args.latent, args.latent)
    z0_hat = z0 + 0.3 * torch.randn_like(z0)
    z0, z0_hat, network = z0.to(args.device), z0_hat.to(args.device), network.to(args.device)

    def ours(*, decoder_precision: str = "fp32", compile_layers: bool = False, **options) -> Run:
        config = LPLConfig(weight=1.0, chunk_size=args.chunk_size, **options)
        dtype = DTYPES[decoder_precision]
        scaling = LatentScaling(
            torch.zeros(SD["latent_channels"]),
            torch.full((SD["latent_channels"],), SD["scaling_factor"]),
        )
        features = DecoderFeatures(
            decoder_stages(copy_of(network)), scaling, config.stages, dtype=dtype
        )
        if compile_layers:
            features.compile_layers()
        loss = LatentPerceptualLoss(config, features.to(args.device))

        def run() -> tuple[Tensor, Tensor]:
            term = loss(z0, z0_hat, torch.ones(len(z0), device=z0.device))
            return term.loss, term.gradient

        return run

    same_math: dict = {"preset": "diffusers_script", "activation_checkpointing": False}
    bf16 = bf16_is_native(torch.device(args.device))
    if not bf16:
        print(
            "this processor has no bf16: bf16 rows are omitted (an emulated convolution "
            "takes minutes)"
        )
    runs: dict[str, Run] = {}
    if args.published:
        runs["published"] = published_loss(args.published, network, z0, z0_hat)
    runs["ours, equal math"] = ours(**same_math)
    runs["ours, equal math, recomputing"] = ours(preset="diffusers_script")
    if bf16:
        runs["ours, equal math, bf16 decoder"] = ours(**same_math, decoder_precision="bf16")
    if args.compile:
        runs["ours, equal math, compiled"] = ours(**same_math, compile_layers=True)
    runs["ours, the paper's loss"] = ours(activation_checkpointing=False)
    runs["ours, the paper's loss, to up1"] = ours(
        activation_checkpointing=False, stages=["mid", "up0", "up1"]
    )
    if bf16:
        runs["ours, the paper's loss, bf16 decoder"] = ours(
            activation_checkpointing=False, decoder_precision="bf16"
        )
    return runs


def copy_of(network: AutoencoderKL) -> AutoencoderKL:
    """Copy of the network, because a row may cast its weights."""
    fresh = AutoencoderKL.from_config(network.config).eval()
    fresh.load_state_dict(network.state_dict())
    return fresh


def published_loss(path: str, network: AutoencoderKL, z0: Tensor, z0_hat: Tensor) -> Run:
    spec = importlib.util.spec_from_file_location("published_lpl", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = module.LatentPerceptualLoss(
        network, norm_type="shared", pow_law=True, num_mid_blocks=4, remove_outliers=True
    )

    def run() -> tuple[Tensor, Tensor]:
        leaf = z0_hat.clone().requires_grad_()
        values = loss.get_loss(leaf, z0)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), gradient

    return run


def measure(runs: dict[str, Run], rounds: int, device: str) -> list[dict]:
    """Run each row once for its peak memory, which also warms it up, then `rounds` timed rounds."""
    results, peaks = {}, {}
    for name, run in runs.items():
        with LiveBytes() as live:
            results[name] = run()
        peaks[name] = live.peak
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - wall)
            cpu_seconds[name].append(time.process_time() - cpu)
    first = next(iter(runs))
    return [
        {
            "row": name,
            "seconds": statistics.median(seconds[name]),
            "cpu_seconds": statistics.median(cpu_seconds[name]),
            "cpu_ratio": statistics.median(
                a / b for a, b in zip(cpu_seconds[name], cpu_seconds[first], strict=True)
            ),
            "peak_mib": peaks[name] / 2**20,
            "peak_ratio": peaks[name] / peaks[first],
            "loss_difference": relative(results[name][0], results[first][0]),
            "gradient_difference": relative(results[name][1], results[first][1]),
        }
        for name in runs
    ]


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def table(rows: list[dict]) -> str:
    lines = [
        "| | seconds | CPU seconds | ratio | peak MiB above weights | ratio | loss differs by | "
        "gradient by |",
        "|---|" + "---|" * 7,
    ]
    for r in rows:
        lines.append(
            f"| {r['row']} | {r['seconds']:.2f} | {r['cpu_seconds']:.2f} | {r['cpu_ratio']:.2f} | "
            f"{r['peak_mib']:,.0f} | {r['peak_ratio']:.2f} | {r['loss_difference']:.1e} | "
            f"{r['gradient_difference']:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
