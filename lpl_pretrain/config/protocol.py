"""What a score can be told: the sampler, a guide, and everything else that it depends on."""

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
    model_validator,
)
from pydantic_core import PydanticKnownError

from lpl_pretrain.config.base import Name, PathText, Section
from lpl_pretrain.config.extractors import EXTRACTORS
from lpl_pretrain.config.metrics import METRICS


class SamplerConfig(Section):
    kind: Literal["ddim", "dpmpp_2m", "euler", "heun"]
    steps: PositiveInt = 50
    shift: PositiveFloat = 1.0
    """euler, heun: as diffusion.timesteps.shift, of the times that are visited."""
    guidance_interval: Optional[tuple[NonNegativeFloat, NonNegativeFloat]] = None
    """Guide only where the noise level sigma_t / alpha_t lies between the two (arXiv 2404.07724).
    """

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> SamplerConfig:
        if (
            self.guidance_interval is not None
            and self.guidance_interval[0] >= self.guidance_interval[1]
        ):
            raise ValueError(
                f"guidance_interval={list(self.guidance_interval)}: the lower noise level "
                "comes first"
            )
        return self


class GuideConfig(Section):
    """A weaker model of the same data, away from which samples are guided, instead of from the null
    class (arXiv 2406.02507).
    """

    run: PathText
    """Run directory; an earlier step of the same run will do."""
    step: Optional[PositiveInt] = None
    """Of a complete checkpoint; absent: the newest."""
    weights: Annotated[str, Field(pattern=r"^(ema|raw|ema_power_0\.[0-9]{3})$")] = "ema"


Weights = Annotated[str, Field(pattern=r"^(ema|raw|ema_power_0\.[0-9]{3}|posthoc_0\.[0-9]{3})$")]
"""The average, the parameters themselves, a power-function average that the run tracks, or one
rebuilt from its snapshots.
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


Metric = Annotated[str, AfterValidator(_known_metric)]
"""Name of a metric: config/metrics.py."""
ExtractorKind = Annotated[str, AfterValidator(_known_extractor)]
"""Kind of a feature extractor: config/extractors.py."""


class ExtractorConfig(Section):
    """A network whose features are compared."""

    kind: ExtractorKind
    """efficientnet_lite0 ships with the package; inception is FID's; timm any network of timm; clip
    a CLIPModel of transformers.
    """
    name: Optional[Annotated[Name, Field(pattern=r"^[a-z0-9_]+$")]] = None
    """In the names of its scores: fd_<name>; absent: its kind, or timm's name of the network."""
    weights: Optional[PathText] = None
    """A file (inception: .pth; timm: .safetensors), or CLIP's folder as transformers'
    save_pretrained writes it.
    """
    network: Optional[Annotated[Name, Field(pattern=r"^[A-Za-z0-9_.]+$")]] = None
    """timm's name of it: vit_large_patch14_dinov2 for FD-DINOv2 (arXiv 2306.04675).  No source
    before it, such as `hf-hub:`, which would download something.
    """
    side_px: PositiveInt = 224
    """timm: pictures are resized to this (bicubic, antialiased)."""

    @property
    def label(self) -> str:
        return self.name or (self.network if self.kind == "timm" and self.network else self.kind)


class EvaluateConfig(Section):
    """One evaluation protocol: everything that the score depends on."""

    name: Name
    images: PositiveInt
    batch_size: PositiveInt = 64
    seed: NonNegativeInt = 0
    repeats: PositiveInt = 1
    """So many sets of pictures, with seeds from `seed` on: a score is their mean, and its error bar
    their standard deviation.
    """
    weights: list[Weights] = ["ema"]
    """Each is scored; `ema_power_0.050` is one that the run tracks, `posthoc_0.080` one rebuilt
    from its snapshots.
    """
    sampler: SamplerConfig
    guide: Optional[GuideConfig] = None
    guidance_scales: list[Annotated[float, Field(ge=1.0)]] = [1.0]
    """1.0 is no guidance; the scales share their noise and classes."""
    extractors: list[ExtractorConfig] = [ExtractorConfig(kind="efficientnet_lite0")]
    """One pass through the pictures serves them all."""
    metrics: list[Metric] = ["fd"]
    """Each is computed for every extractor that gives what it compares (config/metrics.py)."""
    best: Optional[Name] = None
    """The score that the best checkpoint is chosen by, as the record calls it, such as fid; that
    checkpoint is not removed.
    """
    patience: PositiveInt = 3
    """Warn when `best` has been worse than its best for so many evaluations."""
    reference: Union[PathText, list[PathText]]
    """Real pictures: an image folder or WebDataset tars, as in encode; or statistics: a
    .safetensors of `lpl-pretrain reference`, or the usual .npz with mu and sigma (fd of inception
    only).
    """
    reference_features: PositiveInt = 50_000
    """Largest number of real images, evenly spaced, that metrics compare one by one (those with
    `compares_images` in config/metrics.py).
    """
    bootstrap: NonNegativeInt = 0
    """Resamplings for the standard error of fd; 0: none.  With `repeats` the error bars come from
    those.
    """
    kid_subsets: PositiveInt = 100
    kid_subset_size: PositiveInt = 1000
    on_too_few_images: Literal["warn", "refuse"] = "warn"
    """What is done about fewer pictures than features, which bias a Frechet distance upwards."""
    precision: Literal["fp32", "bf16"] = "fp32"
    keep_images: Literal["none", "png", "npz", "tar"] = "none"
    """Also write the pictures, beside the record."""
    grid_images: NonNegativeInt = 64
    """Samples drawn into samples/step_*.png, at the largest guidance scale."""
