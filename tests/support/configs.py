"""Small, valid configurations and data set indexes."""

from lpl_pretrain.config.dataset import (
    FORMAT_VERSION,
    AutoencoderEntry,
    BucketEntry,
    DatasetIndex,
    LatentEntry,
    ShardEntry,
    sealed,
)
from lpl_pretrain.config.schema import TrainConfig

TINY_MMDIT = {"kind": "mmdit", "width": 32, "depth": 2, "heads": 2, "qk_norm": True}
TINY_SDXL = {
    "kind": "unet",
    "preset": "sdxl",
    "settings": {
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": 1,
        "attention_head_dim": [2, 4],
        "addition_time_embed_dim": 8,
    },
}


def train_config(**changes) -> TrainConfig:
    """A tiny flow DiT; `changes` are dotted keys with `__` for the dot."""
    raw = {
        "name": "tiny",
        "steps": 6,
        "autoencoder": "asset:autoencoder_emoji",
        "data": {"folder": "data/x"},
        "model": {"width": 32, "depth": 2, "heads": 2, "patch_size": 2},
        "diffusion": {"prediction": "flow", "schedule": "rectified_flow"},
        "batch": {"global_batch_size": 8},
        "optimizer": {"lr": 1e-3},
        "log": {"every_steps": 1},
        "checkpoint": {"every_steps": 3},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = raw
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return TrainConfig.model_validate(raw)


def dataset_index(
    *,
    identity: str = "0" * 64,
    side: int = 16,
    samples: int = 32,
    channels: int = 4,
    scale: float = 1.09169,
) -> DatasetIndex:
    """Index of a data set encoded by the emoji autoencoder; `model_dump_json` gives index.json."""
    shard = ShardEntry(
        file="latents-00000.tar",
        bucket=0,
        samples=samples,
        bytes=samples * 1000,
        sha256="1" * 64,
        offsets_sha256="2" * 64,
    )
    index = DatasetIndex(
        format_version=FORMAT_VERSION,
        samples=samples,
        classes=["a", "b"],
        class_counts=[samples // 2, samples - samples // 2],
        latent=LatentEntry(
            channels=channels, height=side, width=side, mean=[0.0] * channels, std=[1.0] * channels
        ),
        buckets=[BucketEntry(height=side, width=side, samples=samples)],
        autoencoder=AutoencoderEntry(identity=identity, downscale=4, shift=0.0, scale=scale),
        resolution_px=4 * side,
        source_fingerprint="3" * 64,
        fingerprint="",
        shards=[shard],
    )
    return sealed(index)
