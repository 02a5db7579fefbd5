"""Benchmark `encode`: images/s from JPEG files to a published folder, against a bare loop.

    python tools/bench_encode.py --autoencoder sd --resolution-px 128 --images 64 --rounds 3
    python tools/bench_encode.py --autoencoder asset:autoencoder_emoji --resolution-px 64 \\
        --images 1024 --rounds 3

The bare loop runs the autoencoder on images that are decoded, resized and stacked in memory, and
discards the moments; `encode` also reads, decodes, resizes, checks, packs, hashes and writes.  `sd`
is an autoencoder of Stable Diffusion's shape with random weights.  Both alternate in one process;
the ratio's range is over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.encoding.encode import encode
from lpl_pretrain.encoding.part_encoder import decode
from lpl_pretrain.encoding.sources import list_images
from lpl_pretrain.models.autoencoder import Autoencoder, load_autoencoder

BATCH = 32


def sd_folder(folder: Path) -> str:
    """Save a random autoencoder with the configuration of Stable Diffusion 1.5."""
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    network.save_pretrained(folder)
    return str(folder)


def draw(folder: Path, images: int, side_px: int) -> None:
    """Write JPEG files of blurred noise, in two classes, at twice the resolution."""
    rng = np.random.default_rng(0)
    for n in range(images):
        coarse = rng.integers(0, 256, (side_px // 8, side_px // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((2 * side_px, 2 * side_px), Image.Resampling.BICUBIC)
        path = folder / f"class{n % 2}" / f"{n:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


@torch.inference_mode()
def bare_loop(autoencoder: Autoencoder, batches: list[torch.Tensor]) -> float:
    started = time.perf_counter()
    for batch in batches:
        autoencoder.encode_moments(batch)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--autoencoder", default="sd", help="`sd`, or an `autoencoder` of `encode`")
    parser.add_argument("--resolution-px", type=int, default=128)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lpl-bench-") as name:
        folder = Path(name)
        draw(folder / "images", args.images, args.resolution_px)
        autoencoder_path = (
            sd_folder(folder / "sd") if args.autoencoder == "sd" else args.autoencoder
        )
        autoencoder = load_autoencoder(autoencoder_path)

        def config(output: str) -> EncodeConfig:
            return EncodeConfig(
                source=str(folder / "images"),
                output=str(folder / output),
                autoencoder=autoencoder_path,
                resolution_px=args.resolution_px,
                batch_size=BATCH,
            )

        pixels = [
            decode(image, config("x")).pixels for image in list_images(str(folder / "images"))
        ]
        stacked = torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
        batches = list(stacked.split(BATCH))
        bare_loop(autoencoder, batches[:1])
        rates: list[tuple[float, float]] = []
        for turn in range(args.rounds):
            bare_s = bare_loop(autoencoder, batches)
            started = time.perf_counter()
            encode(config(f"latents{turn}"), autoencoder)
            rates.append((args.images / bare_s, args.images / (time.perf_counter() - started)))
    ratios = [ours / bare for bare, ours in rates]
    bare, ours = (statistics.median(values) for values in zip(*rates, strict=True))
    print(
        f"{args.autoencoder}, {args.resolution_px} px, {args.images} images, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"bare loop {bare:.2f} images/s, encode {ours:.2f} images/s")
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
