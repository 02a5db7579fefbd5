"""Draw docs/pictures/order.png: locations of an epoch's samples, and a lane's seek distances.

python tools/figure_order.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lpl_pretrain.data.lanes import LaneOrder

SHARDS, SHARD_SAMPLES, LANES, BLOCK = 48, 2048, 16, 512
OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "order.png"


def positions(order: LaneOrder, sample_indices: np.ndarray) -> np.ndarray:
    shards, rows = order.locate(sample_indices)
    return shards * SHARD_SAMPLES + rows


def main() -> None:
    order = LaneOrder(
        [SHARD_SAMPLES] * SHARDS, 0, "figure", lanes=LANES, shuffle_block_samples=BLOCK
    )
    sample_indices = np.arange(order.samples)
    location = positions(order, sample_indices)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.6), width_ratios=(2, 1), layout="constrained"
    )
    left.scatter(
        sample_indices,
        location / SHARD_SAMPLES,
        s=0.15,
        c=sample_indices % LANES,
        cmap="tab20",
        rasterized=True,
    )
    left.set(
        xlabel="sample index in the epoch",
        ylabel="shard",
        title=f"{LANES} lanes over {SHARDS} shards, blocks of {BLOCK} samples",
    )
    lane = location.reshape(-1, LANES)
    steps = np.abs(np.diff(lane, axis=0))
    steps = steps[(lane[1:] // SHARD_SAMPLES) == (lane[:-1] // SHARD_SAMPLES)]
    shuffled = np.abs(np.diff(np.random.default_rng(0).permutation(order.samples)))
    bins = np.geomspace(1, order.samples, 60)
    for values, label in (
        (steps, f"a lane: {steps.mean():.0f} on average"),
        (shuffled, f"one shuffle of all: {shuffled.mean():,.0f}"),
    ):
        right.hist(
            values, bins=bins, weights=np.full(len(values), 1 / len(values)), alpha=0.7, label=label
        )
    right.set(
        xscale="log",
        xlabel="samples between two reads",
        ylabel="fraction",
        title="distance to seek",
    )
    right.set_ylim(0, 0.12)
    right.legend(fontsize=8, loc="upper left")
    figure.savefig(OUTPUT, dpi=110)
    print(
        f"{OUTPUT}: a lane moves {steps.mean():.0f} samples between two reads, a whole shuffle "
        f"{shuffled.mean():,.0f}"
    )


if __name__ == "__main__":
    main()
