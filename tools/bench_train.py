"""Benchmark `train` on this machine's accelerators: rows of overrides of one recipe.

    python tools/bench_train.py --recipe configs/train/dit_xl2_in256_lpl.yaml --side 256 \
        --row "bf16: lpl=null" --row "LPL:" --row "LPL, compiled: lpl.compile=true" \
        batch.global_batch_size=128

A row is a name and overrides; overrides after the options apply to all rows.  The latents are
encoded noise and the autoencoder has SD's shape with random weights, so losses are meaningless.
Every row is a command of its own and only its last log line counts, which excludes warm-up and
compilation.  MFU counts the FLOPs of the losses (docs/lpl.md) without recomputation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image

CLASSES = 10
PARTS = ["data", "forward", "lpl", "backward", "optimizer", "ema"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--row", action="append", required=True, help="NAME: OVERRIDE OVERRIDE ...")
    parser.add_argument("--side", type=int, default=256, help="side of the images, in pixels")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument(
        "--steps", type=int, default=20, help="steps of each row; the second half is timed"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="number of processes, one per accelerator"
    )
    parser.add_argument("--json", type=Path, help="append each finished row to this file")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder, args.side, args.images)
        print(
            "| | samples/s | TFLOP/s | MFU | peak GiB | ms an update | "
            + " | ".join(PARTS)
            + " |\n"
            + "|---" * (6 + len(PARTS))
            + "|"
        )
        for number, row in enumerate(args.row):
            title, _, changes = row.partition(":")
            timed = {
                "steps": args.steps,
                "log.every_steps": args.steps // 2,
                "checkpoint.every_steps": 10 * args.steps,
            }
            overrides = [
                *data,
                *(f"{key}={value}" for key, value in timed.items()),
                *args.overrides,
                *changes.split(),
            ]
            line = train(args.recipe, overrides, folder / f"run_{number}", args.processes)
            print(as_row(title, line), flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps({"row": title, **line}) + "\n")


def make_data(folder: Path, side: int, images: int) -> list[str]:
    """Encode noise images; the overrides that select these latents."""
    levels = 4
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    shape = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    }
    AutoencoderKL(**shape, **blocks).save_pretrained(folder / "autoencoder")
    rng = np.random.default_rng(0)
    for i in range(images):
        class_folder = folder / "images" / str(i % CLASSES)
        class_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(
            class_folder / f"{i}.png", compress_level=1
        )
    encode = {
        "source": folder / "images",
        "output": folder / "latents",
        "autoencoder": folder / "autoencoder",
        "resolution_px": side,
    }
    config = folder / "encode.yaml"
    config.write_text("".join(f"{key}: {value}\n" for key, value in encode.items()))
    subprocess.run([sys.executable, "-m", "lpl_pretrain", "encode", config], check=True)
    return [
        f"data.folder={folder / 'latents'}",
        f"autoencoder={folder / 'autoencoder'}",
        "data.flips=false",
    ]


def train(recipe: str, overrides: list[str], run: Path, processes: int) -> dict:
    """Run one row: its last metrics, or {"error": end of its output}."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += [
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            "-m",
        ]
    started = time.monotonic()
    done = subprocess.run(
        [*launcher, "lpl_pretrain", "train", recipe, f"run_dir={run}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        return {"error": done.stdout[-3000:]}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        **[line for line in lines if "event" not in line][-1],
        "whole_command_s": time.monotonic() - started,
    }


def as_row(title: str, line: dict) -> str:
    if "error" in line:
        return f"| {title} | failed: {line['error']}"
    head = (
        f"| {title} | {line['samples_per_s']:.1f} | {line['tflops_per_s']:.1f} | "
        f"{100 * line.get('mfu', float('nan')):.1f} % "
    )
    parts = " | ".join(f"{1000 * line.get('seconds/' + name, 0.0):.1f}" for name in PARTS)
    return (
        head + f"| {line.get('peak_gib', float('nan')):.1f} | {1000 * line['seconds/all']:.0f} | "
        f"{parts} |"
    )


if __name__ == "__main__":
    main()
