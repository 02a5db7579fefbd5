"""What an encode can be told: sources, shapes, what is stored beside a latent, and what becomes of
unreadable pictures.
"""

from __future__ import annotations

from typing import Annotated, Literal, Optional, Union

from pydantic import Field, NonNegativeInt, PositiveInt

from lpl_pretrain.config.base import Name, OnError, PathText, Section, UnitInterval


class BucketsConfig(Section):
    """Aspect-ratio buckets: every picture goes to the shape that cuts least of it off."""

    max_aspect: Annotated[float, Field(ge=1.0)] = 2.0
    """Longest side over shortest."""
    step_px: PositiveInt = 64
    """Sides are multiples of this, and areas at most that of the square of `resolution_px`."""


class TextEncoderConfig(Section):
    folder: PathText
    """A text encoder with its tokenizer, as transformers' save_pretrained writes them (CLIP, T5,
    BERT ...).
    """
    max_tokens: PositiveInt = 77
    """Longer captions are cut."""
    layer: int = -1
    """Which hidden state is stored: -1 the last, -2 the one before (as SDXL takes it from CLIP)."""
    pooled: bool = False
    """Store the encoder's pooled vector too."""
    storage: Literal["int8", "fp16"] = "int8"
    """int8 has a scale per token: half the size, for errors up to 0.4 % of the token's largest
    value.
    """


class EncodeConfig(Section):
    """Pictures to latents."""

    source: Union[PathText, list[PathText]]
    """An image folder (`class/name.png`), or WebDataset tars of png/jpg/webp + cls/txt/json;
    `asset:` and fsspec URLs work too.
    """
    output: PathText
    autoencoder: PathText
    resolution_px: PositiveInt
    """Pictures are resized (Lanczos) to cover a square of this side, or their bucket, and cropped.
    """
    buckets: Optional[BucketsConfig] = None
    """Absent: squares only."""
    crop: Literal["center", "random"] = "center"
    """Where the part lies that is kept; recorded with each sample."""
    flips: bool = False
    """Encode the mirrored picture too, and store it beside the original."""
    text: dict[Annotated[Name, Field(pattern=r"^[a-z0-9_]+$")], TextEncoderConfig] = {}
    """Embeddings of the captions: a name for each encoder; pictures without a caption get that of
    the empty one.
    """
    batch_size: PositiveInt = 32
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the encoders."""
    moments_dtype: Literal["fp16", "bf16"] = "fp16"
    """How moments are stored."""
    shard_samples: PositiveInt = 8192
    """At most so many samples in a shard; an interrupted encode repeats the shards it was working
    on.
    """
    seed: NonNegativeInt = 0
    """Of random crops, and of the order in which the pictures of an image folder go to shards."""
    on_error: OnError = OnError.STOP
    max_skipped_fraction: UnitInterval = 0.001
    """With on_error skip: more unreadable pictures than this share of the source stop the encode.
    """
