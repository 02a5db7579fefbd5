"""An evaluation protocol (configs/evaluate/*.yaml): everything that a score depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Optional, Union

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticKnownError

from lpl_pretrain.config.base import Name, PathText, Section
from lpl_pretrain.config.extractors import EXTRACTORS
from lpl_pretrain.config.metrics import METRICS


class SamplerConfig(Section):
    """Sampler: its kind, steps and times, and where guidance is applied."""

    kind: Literal["ddim", "dpmpp_2m", "euler", "heun"]
    """ddim and dpmpp_2m for eps- and v-prediction; euler and heun for flow."""
    steps: PositiveInt = 50
    """Steps of the sampler; heun evaluates the denoiser twice in each but the last."""
    shift: PositiveFloat = 1.0
    """euler, heun: shift of the times at which the ODE is solved, as diffusion.timesteps.shift."""
    guidance_interval: Optional[tuple[NonNegativeFloat, NonNegativeFloat]] = None
    """Lowest and highest noise level sigma_t / alpha_t with guidance (arXiv 2404.07724); absent:
    guidance at all of them.
    """

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> SamplerConfig:
        interval = self.guidance_interval
        if interval is not None and interval[0] >= interval[1]:
            raise ValueError(
                f"guidance_interval={list(interval)}: the lower noise level comes first"
            )
        return self


class GuideConfig(Section):
    """Autoguidance (arXiv 2406.02507): guide away from a weaker model of the same data instead of
    from the null condition.
    """

    run: PathText
    """Run directory of the weaker model; the same run at an earlier step will do."""
    step: Optional[PositiveInt] = None
    """Step of one of its complete checkpoints; absent: the newest."""
    weights: Annotated[str, Field(pattern=r"^(ema|raw|ema_power_0\.[0-9]{3})$")] = "ema"
    """Weights of that checkpoint: ema, raw, or a power-function average that the run tracks."""


Weights = Annotated[str, Field(pattern=r"^(ema|raw|ema_power_0\.[0-9]{3}|posthoc_0\.[0-9]{3})$")]
"""The EMA, the parameters themselves, a power-function average that the run tracks, or one that is
reconstructed from its snapshots.
"""


def _known_metric(name: str) -> str:
    return _one_of(METRICS, name)


def _known_extractor(kind: str) -> str:
    return _one_of(EXTRACTORS, kind)


def _one_of(known: Mapping[str, object], name: str) -> str:
    """Return `name`.  Raises what a Literal of the `known` names would raise."""
    if name in known:
        return name
    *others, last = map(repr, known)
    raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})


Metric = Annotated[
    str, AfterValidator(_known_metric), WithJsonSchema({"type": "string", "enum": [*METRICS]})
]
"""Name of a metric: config/metrics.py."""
ExtractorKind = Annotated[
    str, AfterValidator(_known_extractor), WithJsonSchema({"type": "string", "enum": [*EXTRACTORS]})
]
"""Kind of a feature extractor: config/extractors.py."""


class ExtractorConfig(Section):
    """A network whose features are compared."""

    kind: ExtractorKind
    """efficientnet_lite0, which ships with the package; inception, the network of FID; timm, any
    network of timm; clip, a CLIPModel of transformers.
    """
    name: Optional[Annotated[Name, Field(pattern=r"^[a-z0-9_]+$")]] = None
    """Suffix of its scores' names: fd_<name>; absent: `kind`, or timm's name of the network."""
    weights: Optional[PathText] = None
    """File of its weights (inception: .pth; timm: .safetensors), or folder of a CLIP model as
    transformers' save_pretrained writes it.
    """
    network: Optional[Annotated[Name, Field(pattern=r"^[A-Za-z0-9_.]+$")]] = None
    """timm: name of the network, such as vit_large_patch14_dinov2 for FD-DINOv2 (arXiv 2306.04675),
    without a source such as `hf-hub:`, which would download it.
    """
    side_px: PositiveInt = 224
    """timm: side that images are resized to (bicubic, antialiased)."""

    @property
    def label(self) -> str:
        """Suffix of its scores' names."""
        if self.name:
            return self.name
        return self.network if self.kind == "timm" and self.network else self.kind


class EvaluateConfig(Section):
    """One evaluation protocol: everything that the score depends on."""

    name: Name
    """Name of the protocol, and of the records of its scores."""
    images: PositiveInt
    """Images that are generated for each score."""
    batch_size: PositiveInt = 64
    """Images per forward of the denoiser and of the extractors."""
    seed: NonNegativeInt = 0
    """Seed of noise, classes and captions."""
    repeats: PositiveInt = 1
    """Number of image sets, with seeds from `seed` on: a score is their mean, its error bar their
    standard deviation.
    """
    weights: list[Weights] = ["ema"]
    """Weights that are scored, each by itself: ema, raw, a power-function average that the run
    tracks (`ema_power_0.050`), or one reconstructed from its snapshots (`posthoc_0.080`).
    """
    sampler: SamplerConfig
    """Sampler: its kind, steps and times."""
    guide: Optional[GuideConfig] = None
    """Weaker model to guide away from; absent: the null condition."""
    guidance_scales: list[Annotated[float, Field(ge=1.0)]] = [1.0]
    """Guidance scales that are scored, with the same noise and classes; 1.0 is no guidance."""
    extractors: list[ExtractorConfig] = [ExtractorConfig(kind="efficientnet_lite0")]
    """Networks whose features are compared, computed in one pass over the images."""
    metrics: list[Metric] = ["fd"]
    """Metrics, each computed for every extractor that has what it compares (config/metrics.py)."""
    best: Optional[Name] = None
    """Score that selects the best checkpoint, by its name in the record, such as fid; that
    checkpoint is not removed.
    """
    patience: PositiveInt = 3
    """Evaluations without an improvement of `best` before a warning."""
    reference: Union[PathText, list[PathText]]
    """Real images: an image folder or WebDataset tars, as in encode; or their statistics: a
    .safetensors file of `lpl-pretrain reference`, or an .npz file with mu and sigma (fd of
    inception only).
    """
    reference_features: PositiveInt = 50_000
    """Largest number of real images, evenly spaced, that metrics compare one by one (those with
    `compares_images` in config/metrics.py).
    """
    bootstrap: NonNegativeInt = 0
    """Bootstrap resamplings for the standard error of fd; 0: none.  With `repeats` the error bars
    come from those.
    """
    kid_subsets: PositiveInt = 100
    """Subsets whose mean is KID."""
    kid_subset_size: PositiveInt = 1000
    """Images in each of them."""
    on_too_few_images: Literal["warn", "refuse"] = "warn"
    """Reaction to fewer images than features, which bias a Frechet distance upwards."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the denoiser."""
    keep_images: Literal["none", "png", "npz", "tar"] = "none"
    """Save the generated images too, beside the record."""
    grid_images: NonNegativeInt = 64
    """Images in the grid samples/step_*.png, at the largest guidance scale."""
