"""Spec of the U-Net (models/unet.py)."""

from __future__ import annotations

from typing import Any

import torch

from lpl_pretrain.config.dataset import DatasetIndex, LatentEntry
from lpl_pretrain.config.model import UNetConfig
from lpl_pretrain.config.online_text import run_text_shape
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.diffusion.denoiser import Denoiser
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.models.spec import DiffusersFormat, DiffusersNetwork, ModelSpec, State

PREFIX = "network."
"""diffusers' names are ours without it."""
MISSING_COMPONENTS = (
    "image_encoder",
    "feature_extractor",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
)


def build(
    config: UNetConfig, latent: LatentEntry, num_classes: int, text: TextShape | None
) -> Denoiser:
    from lpl_pretrain.models.unet import UNet  # importing diffusers' network takes seconds

    return UNet(config, latent.channels, latent.height, num_classes, text)


def from_diffusers(settings: dict[str, Any], state: State) -> tuple[None, State]:
    """Our names; the settings are not compared, the shapes of the weights are."""
    return None, {f"{PREFIX}{name}": tensor for name, tensor in state.items()}


def to_pipeline(config: TrainConfig, index: DatasetIndex, state: State) -> DiffusersNetwork:
    """Network of a StableDiffusionXLPipeline without its text encoders."""
    model = config.model
    assert isinstance(model, UNetConfig)
    if model.preset != "sdxl":
        raise ConfigError(
            f"model.preset={model.preset}: only sdxl has a pipeline that takes embeddings; "
            "export a file"
        )
    with torch.device("meta"):
        text = run_text_shape(config, index)
        network: Any = build(model, index.latent, len(index.classes), text)
    settings = {
        key: value for key, value in network.network.config.items() if not key.startswith("_")
    }
    return DiffusersNetwork(
        "unet",
        settings,
        {name.removeprefix(PREFIX): tensor for name, tensor in state.items()},
        pipeline="StableDiffusionXLPipeline",
        missing=MISSING_COMPONENTS,
        index_entries={"force_zeros_for_empty_prompt": False},
    )


def pipeline_problems(config: TrainConfig, index: DatasetIndex) -> list[str]:
    return []


UNET = ModelSpec(
    config=UNetConfig,
    build=build,
    float8_skip=("time_emb_proj",),
    diffusers=DiffusersFormat(
        class_name="UNet2DConditionModel",
        from_diffusers=from_diffusers,
        to_pipeline=to_pipeline,
        pipeline_problems=pipeline_problems,
    ),
)
