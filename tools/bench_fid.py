"""Benchmark the Frechet distance against scipy.linalg.sqrtm on the same statistics.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python tools/bench_fid.py

Features are random with variances that fall 10,000-fold; the reference has 10,000 images.  The last
row, with two nearly singular covariances, makes our implementation take its slow path.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch

from lpl_pretrain.evaluation.fid import frechet_distance
from lpl_pretrain.evaluation.stats import FeatureStatistics


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="timed rounds, after one warm-up of ours",
    )
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    full = random_statistics(10_000, args.dimension, 1e-4, seed=0)
    cases = {
        "full rank, 10,000 images": (random_statistics(10_000, args.dimension, 1e-4, seed=1), full),
        "512 images": (random_statistics(512, args.dimension, 1e-4, seed=2), full),
        "512 images on both sides": (
            random_statistics(512, args.dimension, 1e-4, seed=3),
            random_statistics(512, args.dimension, 1e-4, seed=4),
        ),
        "nearly singular": (
            random_statistics(10_000, args.dimension, 1e-12, seed=5),
            random_statistics(10_000, args.dimension, 1e-12, seed=6),
        ),
    }
    print(
        f"{torch.get_num_threads()} threads, {args.dimension} features, medians of "
        f"{args.rounds} rounds\n"
    )
    print("| | ours, s | sqrtm, s | ratio | differ by, of the traces |")
    print("|---|---|---|---|---|")
    for name, (a, b) in cases.items():
        print(row(name, a, b, args.rounds), flush=True)


def random_statistics(count: int, dimension: int, smallest: float, seed: int) -> FeatureStatistics:
    """Statistics of `count` random features with variances from 1 down to `smallest`."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(
        torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    ).Q
    mix = torch.logspace(0, np.log10(smallest) / 2, dimension, dtype=torch.float64)[:, None] * basis
    result = FeatureStatistics(dimension)
    result.update(torch.randn(count, dimension, generator=generator, dtype=torch.float64) @ mix)
    return result


def scipy_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The formula of pytorch-fid 0.3.0."""
    product = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    return float(
        (a.mean - b.mean).square().sum()
        + a.covariance.trace()
        + b.covariance.trace()
        - 2 * np.trace(product).real
    )


def row(name: str, a: FeatureStatistics, b: FeatureStatistics, rounds: int) -> str:
    frechet_distance(a, b)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(timed(lambda: frechet_distance(a, b)))
        theirs.append(timed(lambda: scipy_distance(a, b)))
    seconds = [statistics.median(turn[0] for turn in turns) for turns in (ours, theirs)]
    ratio = statistics.median(b[0] / a[0] for a, b in zip(ours, theirs, strict=True))
    difference = (
        abs(ours[0][1] - theirs[0][1]) / (a.covariance.trace() + b.covariance.trace()).item()
    )
    return f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} | {ratio:.1f} | {difference:.1e} |"


def timed(run: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    value = run()
    return time.perf_counter() - start, value


if __name__ == "__main__":
    main()
