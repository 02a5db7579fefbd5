"""Data with one poisoned shard, and runs on it.

The shard is the whole global batch of one update in each epoch, and of no other update.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lpl_pretrain.config.data_mixture import read_data
from lpl_pretrain.config.dataset import read_index
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.data.order import SampleOrder
from lpl_pretrain.encoding.encode import encode
from tests.support.autoencoders import tiny_folder
from tests.support.configs import train_config
from tests.support.latents import draw_images, poison_shard
from tests.support.training import ROOT, ZERO_CONFIGS

BATCH, SAMPLES, POISONED = 8, 96, 5
STEPS, EVERY = 16, 4
FIRST, SECOND = 10, 16
"""Updates of the first two epochs, of 12 each, that train on the poisoned shard."""
DATA: dict[str, Any] = {"lanes": 1, "shuffle_block_samples": BATCH}
"""Stream settings under which a block is one shard and one update."""
SPIKE = {"window_updates": 16, "min_updates": 8, "noise_levels": 4}


@dataclass(frozen=True)
class Poisoned:
    folder: str
    autoencoder: str
    seed: int


def poisoned_data(folder: Path) -> Poisoned:
    """Encode the data and find a seed that puts the poisoned shard at FIRST and SECOND."""
    autoencoder = tiny_folder(folder / "autoencoder")
    latents = str(folder / "latents")
    draw_images(folder / "images", SAMPLES)
    encode(
        EncodeConfig(
            source=str(folder / "images"),
            output=latents,
            autoencoder=autoencoder,
            resolution_px=32,
            shard_samples=BATCH,
        )
    )
    assert {entry.samples for entry in read_index(Path(latents)).shards} == {BATCH}
    poison_shard(latents, POISONED, 50.0)
    sample_indices = np.arange(2 * SAMPLES)
    data = read_data(latents)
    for seed in range(10_000):
        locations = SampleOrder(data, seed, BATCH, **DATA).locate(sample_indices)
        if set(sample_indices[locations.shard == POISONED] // BATCH) == {FIRST, SECOND}:
            return Poisoned(latents, autoencoder, seed)
    raise AssertionError(f"no seed below 10,000 puts shard {POISONED} at {FIRST} and {SECOND}")


def spike_config(
    data: Poisoned, on_spike: str, strategy: str = "local", **changes: Any
) -> TrainConfig:
    """Configuration with plain SGD, in float64 except under ZeRO."""
    parallel = {"strategy": strategy, "precision": "fp64"}
    if strategy in ZERO_CONFIGS:
        parallel = {"strategy": "zero", "zero_config": str(ROOT / ZERO_CONFIGS[strategy])}
    return train_config(
        **{
            "seed": data.seed,
            "steps": STEPS,
            "data": {"folder": data.folder, **DATA},
            "autoencoder": data.autoencoder,
            "model__width": 16,
            "model__depth": 1,
            "optimizer": {
                "kind": "sgd",
                "lr": 0.05,
                "max_grad_norm": 1e9,
                "on_spike": on_spike,
                "spike": SPIKE,
            },
            "parallel": parallel,
            "batch": {"global_batch_size": BATCH, "micro_batch_size": 2},
            "checkpoint": {"every_steps": EVERY},
            "log": {"every_steps": 1, "sample_indices": True},
            "preflight": None,
            **changes,
        }
    )
