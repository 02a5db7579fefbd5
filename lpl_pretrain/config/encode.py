"""The encode configuration (configs/encode/*.yaml): sources, shapes, what is stored beside a
latent, and what to do about unreadable images.
"""

from __future__ import annotations

from typing import Annotated, Literal, Optional, Union

from pydantic import Field, NonNegativeInt, PositiveInt

from lpl_pretrain.config.base import Name, OnError, PathText, Section, UnitInterval


class BucketsConfig(Section):
    """Aspect-ratio buckets: each image goes to the shape that crops least of it."""

    max_aspect: Annotated[float, Field(ge=1.0)] = 2.0
    """Largest ratio of the longer side to the shorter one."""
    step_px: PositiveInt = 64
    """Unit of the sides; the area is at most that of a square of `resolution_px`."""


class TextEncoderConfig(Section):
    """A text encoder, and what is taken from it."""

    folder: PathText
    """Folder of a text encoder and its tokenizer, as transformers' save_pretrained writes them
    (CLIP, T5, BERT ...).
    """
    max_tokens: PositiveInt = 77
    """Length of a caption's sequence; longer captions are truncated."""
    layer: int = -1
    """Hidden state that is used: -1 the last one, -2 the one before (as SDXL does with CLIP)."""
    pooled: bool = False
    """Use the encoder's pooled vector too."""
    storage: Literal["int8", "fp16"] = "int8"
    """Number format on disk; int8 has a scale per token: half the size, with errors up to 0.4 % of
    the token's largest value.
    """


class EncodeConfig(Section):
    """One encoding of images into latents."""

    source: Union[PathText, list[PathText]]
    """Images: an image folder (`class/name.png`), or WebDataset tars of png/jpg/webp +
    cls/txt/json, also as `asset:NAME` or fsspec URLs.
    """
    output: PathText
    """Folder of the encoded latents."""
    autoencoder: PathText
    """Folder of a diffusers autoencoder, or `asset:NAME` for one that ships with the package."""
    resolution_px: PositiveInt
    """Side of a square image; images are resized (Lanczos) to cover it, or their bucket, and
    cropped.
    """
    buckets: Optional[BucketsConfig] = None
    """Aspect-ratio buckets; absent: squares only."""
    crop: Literal["center", "random"] = "center"
    """Position of the crop, which is recorded with each sample."""
    flips: bool = False
    """Encode the mirrored image too, and store it beside the original."""
    text: dict[Annotated[Name, Field(pattern=r"^[a-z0-9_]+$")], TextEncoderConfig] = {}
    """Text encoders whose embeddings of the captions are stored, by name; an image without a
    caption gets those of the null text.
    """
    batch_size: PositiveInt = 32
    """Images per forward of the autoencoder."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the encoders."""
    moments_dtype: Literal["fp16", "bf16"] = "fp16"
    """Number format of the moments on disk."""
    shard_samples: PositiveInt = 8192
    """Largest number of samples in a shard; an interrupted encode repeats the shards that were not
    complete.
    """
    seed: NonNegativeInt = 0
    """Seed of random crops, and of the order in which images of an image folder go to shards."""
    on_error: OnError = OnError.STOP
    """Reaction to an image that cannot be read."""
    max_skipped_fraction: UnitInterval = 0.001
    """Largest fraction of unreadable images that on_error skip accepts."""
