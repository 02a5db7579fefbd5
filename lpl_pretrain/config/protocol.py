"""What a score can be told: the sampler, a guide, and everything else that it depends on."""

from __future__ import annotations

from typing import Annotated, Literal, Optional, Union

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lpl_pretrain.config.section import Section


class SamplerConfig(Section):
    kind: Literal["ddim", "dpmpp_2m", "euler", "heun"]
    steps: PositiveInt = 50
    shift: PositiveFloat = 1.0
    """euler, heun: as diffusion.timesteps.shift, of the times that are visited."""
    guidance_interval: Optional[tuple[NonNegativeFloat, NonNegativeFloat]] = None
    """Guide only where the noise level sigma_t / alpha_t lies between the two (arXiv 2404.07724)."""

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> SamplerConfig:
        if self.guidance_interval is not None and self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval={list(self.guidance_interval)}: the lower noise level comes first")
        return self


class GuideConfig(Section):
    """A weaker model of the same data, away from which samples are guided, instead of from the null class (arXiv 2406.02507)."""

    run: str
    """Run directory; an earlier step of the same run will do."""
    step: Optional[PositiveInt] = None
    """Of a complete checkpoint; absent: the newest."""
    weights: Annotated[str, Field(pattern=r"^(ema|raw|ema_power_0\.\d{3})$")] = "ema"


class EvaluateConfig(Section):
    """One evaluation protocol: everything that the score depends on."""

    name: str
    images: PositiveInt
    batch_size: PositiveInt = 64
    seed: NonNegativeInt = 0
    weights: Annotated[str, Field(pattern=r"^(ema|raw|ema_power_0\.\d{3})$")] = "ema"
    """The average, the parameters themselves, or a power-function average that the run tracks (`ema_power_0.050`)."""
    sampler: SamplerConfig
    guide: Optional[GuideConfig] = None
    guidance_scales: list[Annotated[float, Field(ge=1.0)]] = [1.0]
    """1.0 is no guidance; the scales share their noise and classes."""
    extractor: Literal["efficientnet_lite0", "inception"] = "efficientnet_lite0"
    inception_weights: Optional[str] = None
    """Path of the standard FID Inception weights (extractor inception)."""
    reference: Union[str, list[str]]
    """Real pictures: an image folder or WebDataset tars, as in encode."""
    precision: Literal["fp32", "bf16"] = "fp32"
    grid_images: NonNegativeInt = 64
    """Samples drawn into samples/step_*.png, at the largest guidance scale."""
