"""The `model` section: which denoiser is trained, how large, and with which options, all of which
are off by default.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Optional, Union

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from lpl_pretrain.config.base import Section
from lpl_pretrain.config.message import short
from lpl_pretrain.config.unet import FROM_DATA, argument_problems, settings_problems

DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""width, depth, heads (arXiv 2212.09748, table 1)."""
MMDIT_SIZES = {**DIT_SIZES, "2B": (1536, 24, 24), "8B": (2432, 38, 38)}
"""The last two: depth d, d heads of 64 channels (arXiv 2403.03206, section 4)."""


class TransformerConfig(Section):
    """Keys that the transformers have in common."""

    SIZES: ClassVar[dict[str, tuple[int, int, int]]] = {}
    """Preset -> width, depth, heads."""

    width: Annotated[int, Field(ge=1, le=65_536)]
    """Channels of a token."""
    depth: Annotated[int, Field(ge=1, le=1024)]
    """Number of blocks."""
    heads: PositiveInt
    """Attention heads; a divisor of `width`."""
    patch_size: Annotated[int, Field(ge=1, le=256)] = 2
    """Side of a patch in latent positions; a patch is one token."""
    mlp_ratio: Annotated[float, Field(gt=0.0, le=64.0)] = 4.0
    """Hidden channels of the MLP divided by `width`."""
    qk_norm: bool = False
    """Normalise queries and keys of each head (arXiv 2302.05442), which keeps large models stable
    in bf16.
    """
    position_side: Optional[PositiveInt] = None
    """Side, in patches, of the images that the position embedding was trained at; positions of
    larger images are scaled into the same range.
    """

    @property
    def latent_multiple(self) -> int:
        """Latent height and width must be divisible by this."""
        return self.patch_size

    @model_validator(mode="before")
    @classmethod
    def _expand_size(cls, raw: Any) -> Any:
        return expand_size(raw, cls.SIZES)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TransformerConfig:
        if self.width % self.heads:
            raise ValueError(
                f"width={self.width} is not a multiple of heads={self.heads}: choose a "
                "width that is"
            )
        if self.width % 4:
            raise ValueError(
                f"width={self.width}: rows and columns have a sine and a cosine each: wanted a "
                "multiple of 4"
            )
        return self

    @model_validator(mode="after")
    def _mlp_has_channels(self) -> TransformerConfig:
        if self.mlp_channels < 1:
            raise ValueError(
                f"mlp_ratio={self.mlp_ratio} with width={self.width}: leaves the MLP no "
                "channel; raise it"
            )
        return self

    @property
    def mlp_channels(self) -> int:
        """Hidden channels of the MLP, before a gated MLP rounds them up."""
        hidden = int(self.width * self.mlp_ratio)
        is_gated = getattr(self, "swiglu", False)
        return hidden * 2 // 3 if is_gated else hidden


class DiTConfig(TransformerConfig):
    """Diffusion transformer with adaLN-Zero (arXiv 2212.09748); the published one unless options
    are set.
    """

    SIZES = DIT_SIZES

    kind: Literal["dit"] = "dit"
    size: Optional[Literal["S", "B", "L", "XL"]] = None
    """Preset of width, depth and heads (arXiv 2212.09748, table 1)."""
    rope: bool = False
    """Rotate queries and keys by row and column (arXiv 2104.09864), beside the absolute embedding.
    """
    swiglu: bool = False
    """Gated MLP (arXiv 2002.05202) of two thirds of the hidden width: as many parameters."""
    rms_norm: bool = False
    """RMSNorm (arXiv 1910.07467) instead of LayerNorm."""
    text: Optional[Literal["in_context", "cross_attention"]] = None
    """Read the encoders of `conditioning.text_encoders`: as tokens before those of the image
    (in_context), or by a cross-attention in every block.
    """
    learned_sigma: bool = False
    """Predict the variance of a sampling step too (for eps and v; arXiv 2102.09672, section 3.1),
    as the published checkpoints do.
    """
    timestep_frequencies: Literal["dit", "diffusers"] = "dit"
    """Frequencies of the timestep embedding: those of the published DiT, or the slightly different
    ones of diffusers' DiT, which a model for export to diffusers needs.
    """

    @property
    def reads_text(self) -> bool:
        return self.text is not None

    @property
    def reads_classes(self) -> bool:
        return True

    @property
    def needs_pooled(self) -> bool:
        return False

    @model_validator(mode="after")
    def _heads_can_rotate(self) -> DiTConfig:
        if self.rope and self.width // self.heads % 4:
            raise ValueError(
                f"rope=true with heads of {self.width // self.heads} channels: rows and columns "
                "want a multiple of 4"
            )
        return self


class MMDiTConfig(TransformerConfig):
    """Multimodal diffusion transformer (SD3, arXiv 2403.03206): conditioned on the text encoders of
    `conditioning.text_encoders`.
    """

    SIZES = MMDIT_SIZES

    kind: Literal["mmdit"] = "mmdit"
    size: Optional[Literal["S", "B", "L", "XL", "2B", "8B"]] = None
    """Preset of width, depth and heads."""

    @property
    def reads_text(self) -> bool:
        return True

    @property
    def reads_classes(self) -> bool:
        return False

    @property
    def needs_pooled(self) -> bool:
        return True


UNETS: dict[str, dict[str, Any]] = {
    "ldm": {  # LDM-4, class-conditional (arXiv 2112.10752, table 12)
        "block_out_channels": (192, 384, 576, 960),
        "down_block_types": (
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
        ),
        "up_block_types": (
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "UpBlock2D",
        ),
        "attention_head_dim": 1,
        "cross_attention_dim": 512,
    },
    "sd": {
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        "up_block_types": (
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ),
        "attention_head_dim": 8,
    },
    "sdxl": {  # arXiv 2307.01952, table 1
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
    },
}
"""Arguments of diffusers' UNet2DConditionModel; `attention_head_dim` is the number of heads there.
"""


class UNetConfig(Section):
    """diffusers' UNet2DConditionModel: ldm is conditioned on classes, sd on text states, sdxl on
    pooled text and sizes too.
    """

    kind: Literal["unet"] = "unet"
    preset: Literal["ldm", "sd", "sdxl"]
    """Architecture: of LDM-4, Stable Diffusion 1 or SDXL."""
    settings: dict[str, Any] = {}
    """Arguments of UNet2DConditionModel that replace the preset's; channels of latents and text
    follow from the data.
    """

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of UNet2DConditionModel: the preset's, replaced by `settings`."""
        given = {key: value for key, value in self.settings.items() if value is not None}
        return {**UNETS[self.preset], **given}

    @property
    def reads_text(self) -> bool:
        return self.preset != "ldm"

    @property
    def reads_classes(self) -> bool:
        return self.preset == "ldm"

    @property
    def needs_pooled(self) -> bool:
        return self.preset == "sdxl"

    @property
    def latent_multiple(self) -> int:
        """Latent height and width must be divisible by this."""
        return 2 ** (len(self.arguments["block_out_channels"]) - 1)

    @model_validator(mode="after")
    def _settings_fit_together(self) -> UNetConfig:
        from_data = set(FROM_DATA)
        if self.reads_text:
            from_data.add("cross_attention_dim")
        if taken := sorted(from_data & self.settings.keys()):
            raise ValueError(f"settings.{taken[0]}: follows from the data; leave it out")
        if problems := settings_problems(self.settings) or argument_problems(self.arguments):
            raise ValueError("; ".join(f"settings.{problem}" for problem in problems[:3]))
        return self


def expand_size(raw: Any, sizes: dict[str, tuple[int, int, int]]) -> Any:
    """Raw section with the width, depth and heads of its `size`; given ones have to agree."""
    size = raw.get("size") if isinstance(raw, dict) else None
    if not isinstance(size, str) or size not in sizes:
        return raw
    meant = dict(zip(("width", "depth", "heads"), sizes[size], strict=True))
    for key, value in meant.items():
        if raw.get(key, value) != value:
            raise ValueError(
                f"{key}={short(raw[key])} with size={size}, which has {value}: leave one of "
                "the two out"
            )
    return {**raw, **meant}


def _kind(raw: Any) -> Any:
    kind = raw.get("kind", "dit") if isinstance(raw, dict) else getattr(raw, "kind", None)
    return kind if kind is None or isinstance(kind, str) else short(kind)


ModelConfig = Annotated[
    Union[
        Annotated[DiTConfig, Tag("dit")],
        Annotated[MMDiTConfig, Tag("mmdit")],
        Annotated[UNetConfig, Tag("unet")],
    ],
    Discriminator(_kind),
]
"""Section `model`: a class by its `kind`, which is dit when absent."""
