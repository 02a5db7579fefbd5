"""Spec of the DiT (models/dit.py)."""

from __future__ import annotations

from typing import Any

import torch

from lpl_pretrain.config.dataset import DatasetIndex, LatentEntry
from lpl_pretrain.config.model import DiTConfig
from lpl_pretrain.config.schema import Prediction, TrainConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.diffusion.denoiser import Denoiser
from lpl_pretrain.models import convert_dit
from lpl_pretrain.models.spec import DiffusersFormat, DiffusersNetwork, ModelSpec, State

IMAGENET_CLASSES = 1000
"""Null class of DiTPipeline, whatever the data: a smaller table is filled up with our null class.
"""


def build(
    config: DiTConfig, latent: LatentEntry, num_classes: int, text: TextShape | None
) -> Denoiser:
    from lpl_pretrain.models.dit import DiT

    return DiT(config, latent.channels, latent.height, latent.width, num_classes, text)


def to_pipeline(config: TrainConfig, index: DatasetIndex, state: State) -> DiffusersNetwork:
    """Network of a DiTPipeline."""
    model = config.model
    assert isinstance(model, DiTConfig)
    num_classes = len(index.classes)
    if num_classes < IMAGENET_CLASSES:
        table = state["y_embedder.embedding_table.weight"]
        null_rows = table[-1:].expand(IMAGENET_CLASSES - num_classes, -1)
        state = {**state, "y_embedder.embedding_table.weight": torch.cat([table, null_rows])}
    settings, theirs = convert_dit.to_diffusers(
        state,
        model,
        channels=index.latent.channels,
        side=index.latent.height,
        num_classes=max(num_classes, IMAGENET_CLASSES),
    )
    labels: dict[str, Any] = {"id2label": {str(i): name for i, name in enumerate(index.classes)}}
    return DiffusersNetwork(
        "transformer", settings, theirs, pipeline="DiTPipeline", index_entries=labels
    )


def pipeline_problems(config: TrainConfig, index: DatasetIndex) -> list[str]:
    if config.diffusion.prediction is not Prediction.FLOW:
        return []
    return [
        "diffusion.prediction=flow with model.kind=dit: diffusers' DiTPipeline knows eps and "
        "v; export a file"
    ]


DIT = ModelSpec(
    config=DiTConfig,
    build=build,
    float8_skip=("modulation",),
    diffusers=DiffusersFormat(
        class_name="DiTTransformer2DModel",
        from_diffusers=convert_dit.from_diffusers,
        to_pipeline=to_pipeline,
        pipeline_problems=pipeline_problems,
    ),
)
