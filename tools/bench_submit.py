"""Benchmark `launch train` for ImageNet on a login node, in CPU seconds, with a fake sbatch.

    python tools/bench_submit.py --nodes 64 --rounds 5 [key=values of a sweep ...]

The run is configs/train/dit_xl2_in256.yaml with 8 processes a node.  The index has 1,281,167
samples in 1,252 shards.  The autoencoder has 335 MB of random bytes as weights, the size of SD's,
which are hashed to verify that it encoded the latents.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lpl_pretrain.config.dataset import (
    FORMAT_VERSION,
    INDEX_NAME,
    AutoencoderEntry,
    BucketEntry,
    DatasetIndex,
    LatentEntry,
    ShardEntry,
    index_bytes,
    sealed,
)
from lpl_pretrain.config.hashing import WEIGHTS, autoencoder_identity

ROOT = Path(__file__).resolve().parents[1]
SAMPLES, SHARD, CLASSES, WEIGHTS_MB = 1_281_167, 1024, 1000, 335
AUTOENCODER = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def build(folder: Path) -> None:
    """Write the index, the autoencoder and an sbatch script that accepts everything."""
    autoencoder, latents = folder / "autoencoder", folder / "latents"
    for path in (autoencoder, latents):
        path.mkdir()
    (autoencoder / "config.json").write_text(json.dumps(AUTOENCODER))
    with (autoencoder / WEIGHTS).open("wb") as file:
        for _ in range(WEIGHTS_MB):
            file.write(os.urandom(10**6))
    sizes = [min(SHARD, SAMPLES - first) for first in range(0, SAMPLES, SHARD)]
    index = DatasetIndex(
        format_version=FORMAT_VERSION,
        samples=SAMPLES,
        classes=[f"n{c:08d}" for c in range(CLASSES)],
        class_counts=[SAMPLES // CLASSES + (c < SAMPLES % CLASSES) for c in range(CLASSES)],
        latent=LatentEntry(channels=4, height=32, width=32, mean=[0.0] * 4, std=[1.0] * 4),
        buckets=[BucketEntry(height=32, width=32, samples=SAMPLES)],
        flipped=True,
        autoencoder=AutoencoderEntry(
            identity=autoencoder_identity(autoencoder), downscale=8, shift=0.0, scale=0.18215
        ),
        resolution_px=256,
        source_fingerprint="0" * 64,
        fingerprint="",
        shards=[
            ShardEntry(
                file=f"{n:06d}.tar",
                bucket=0,
                samples=size,
                bytes=size * 40_000,
                sha256=f"{n:064d}",
                offsets_sha256=f"{n:064d}",
            )
            for n, size in enumerate(sizes)
        ],
    )
    (latents / INDEX_NAME).write_bytes(index_bytes(sealed(index)))
    (folder / "sbatch").write_text(
        '#!/bin/sh\n[ "$1" = --parsable ] && echo 4711 || echo Submitted batch job 4711\n'
    )
    (folder / "sbatch").chmod(0o755)


def submit(folder: Path, number: int, nodes: int, sweeps: list[str]) -> float:
    """Submit once; CPU seconds, user and system, of the command and its children."""
    keys = [
        f"data.folder={folder}/latents",
        f"autoencoder={folder}/autoencoder",
        f"run_dir={folder}/run_{number}",
    ]
    keys.append(f"batch.global_batch_size={8 * nodes}")
    options = [
        "--cluster",
        "configs/cluster/slurm.yaml",
        "--nodes",
        str(nodes),
        *(f"--sweep={sweep}" for sweep in sweeps),
    ]
    command = [
        sys.executable,
        "-m",
        "launch",
        "train",
        "configs/train/dit_xl2_in256.yaml",
        *keys,
        *options,
    ]
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweeps", nargs="*")
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        seconds = [
            submit(Path(folder), number, args.nodes, args.sweeps) for number in range(args.rounds)
        ]
    span = f"{min(seconds):.2f} to {max(seconds):.2f}, {args.rounds} rounds"
    print(f"{statistics.median(seconds):.2f} s of CPU time ({span})")


if __name__ == "__main__":
    main()
