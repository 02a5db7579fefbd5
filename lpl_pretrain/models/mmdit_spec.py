"""Spec of the MMDiT (models/mmdit.py)."""

from __future__ import annotations

from lpl_pretrain.config.dataset import DatasetIndex, LatentEntry
from lpl_pretrain.config.model import MMDiTConfig
from lpl_pretrain.config.online_text import run_text_shape
from lpl_pretrain.config.schema import Prediction, TrainConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.diffusion.denoiser import Denoiser
from lpl_pretrain.models import convert_mmdit
from lpl_pretrain.models.spec import DiffusersFormat, DiffusersNetwork, ModelSpec, State

MISSING_COMPONENTS = (
    "image_encoder",
    "feature_extractor",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "text_encoder_3",
    "tokenizer_3",
)


def build(
    config: MMDiTConfig, latent: LatentEntry, num_classes: int, text: TextShape | None
) -> Denoiser:
    from lpl_pretrain.models.mmdit import MMDiT

    assert text is not None, "config/check.py asks for text"
    return MMDiT(config, latent.channels, latent.height, latent.width, text)


def to_pipeline(config: TrainConfig, index: DatasetIndex, state: State) -> DiffusersNetwork:
    """Network of a StableDiffusion3Pipeline without its text encoders."""
    from lpl_pretrain.models.layers import sincos_position_embedding

    model = config.model
    text = run_text_shape(config, index)
    assert isinstance(model, MMDiTConfig) and text is not None
    side = index.latent.height
    settings, theirs = convert_mmdit.to_diffusers(
        state, model, channels=index.latent.channels, side=side, text=text
    )
    grid = side // model.patch_size
    theirs["pos_embed.pos_embed"] = sincos_position_embedding(model.width, grid, grid)
    return DiffusersNetwork(
        "transformer",
        settings,
        theirs,
        pipeline="StableDiffusion3Pipeline",
        missing=MISSING_COMPONENTS,
    )


def pipeline_problems(config: TrainConfig, index: DatasetIndex) -> list[str]:
    prediction = config.diffusion.prediction
    if prediction is Prediction.FLOW:
        return []
    return [
        f"diffusion.prediction={prediction.value} with model.kind=mmdit: diffusers' pipeline "
        "knows flow"
    ]


MMDIT = ModelSpec(
    config=MMDiTConfig,
    build=build,
    float8_skip=("modulation",),
    diffusers=DiffusersFormat(
        class_name="SD3Transformer2DModel",
        from_diffusers=convert_mmdit.from_diffusers,
        to_pipeline=to_pipeline,
        pipeline_problems=pipeline_problems,
        shifts_latents=True,
    ),
)
