"""The `lpl` section, the Latent Perceptual Loss: which samples and features it compares, how they
are normalised, its weight, and its cost.

docs/lpl.md gives the source of every option.
"""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from lpl_pretrain.config.base import Name, PathText, Section
from lpl_pretrain.config.diffusion import WeightingConfig


class GateConfig(Section):
    """Bound on the noise level of samples that LPL compares: beyond it the one-step estimate is too
    blurred.  Exactly one of the three is set.
    """

    snr_above: Optional[PositiveFloat] = None
    """SNR, alpha_t^2 / sigma_t^2, of at least this."""
    noise_level_below: Optional[PositiveFloat] = None
    """Noise level, sigma_t / alpha_t, of at most this."""
    timestep_below: Optional[PositiveInt] = None
    """Integer timestep less than this (discrete schedules only)."""

    @model_validator(mode="after")
    def _exactly_one(self) -> GateConfig:
        found = [
            name
            for name in ("snr_above", "noise_level_below", "timestep_below")
            if getattr(self, name) is not None
        ]
        if len(found) != 1:
            raise ValueError(
                "set exactly one of snr_above, noise_level_below, timestep_below; found "
                f"{found or 'none'}"
            )
        return self


class NormalizeConfig(Section):
    """Normalisation of the features of both branches (losses/lpl/normalization.py)."""

    over: Literal["space", "channels", "batch"] = "space"
    """Statistics over the positions of a channel, over the channels at a position, or over
    positions and all gated samples.
    """
    source: Literal["prediction", "target", "own"] = "prediction"
    """Branch whose statistics normalise both branches (the paper: the prediction's), or `own`:
    each branch by its own.
    """
    gradient: bool = True
    """Whether gradients flow through the prediction's statistics.  A replication without it kept
    16-39 % of the gain.
    """
    kind: Literal["std", "l2_norm"] = "std"
    """Subtract the mean and divide by the standard deviation; or divide by the L2 norm, as the
    public implementation does.
    """

    @model_validator(mode="after")
    def _norm_of_a_batch(self) -> NormalizeConfig:
        if (self.over, self.kind) == ("batch", "l2_norm"):
            raise ValueError(
                "over=batch with kind=l2_norm: a norm over a batch grows with the batch; "
                "use kind=std"
            )
        return self


class OutlierConfig(Section):
    """Positions of a feature map that are masked out of the distance as outliers (docs/lpl.md)."""

    quantiles: tuple[
        Annotated[float, Field(gt=0.0, lt=1.0)], Annotated[float, Field(gt=0.0, lt=1.0)]
    ] = (0.02, 0.98)
    """Lower and upper quantile of a channel's values."""
    margin: NonNegativeFloat = 2.0
    """Standard deviations beyond the two quantiles that still count as inliers."""
    source: Literal["target", "prediction"] = "target"
    """Branch whose values define outliers."""
    first_stage: NonNegativeInt = 0
    """First stage with a mask, counted in decoder order (mid is 0)."""
    kernels: tuple[tuple[PositiveInt, PositiveInt], ...] = ((1, 3), (1, 3), (1, 3), (3, 5))
    """Kernel sides of the dilation, then of the erosion, of the mask of inliers, a pair for each
    stage; the last pair serves all later ones.
    """
    zeroed_in_statistics: bool = False
    """Whether masked positions count as zeros in the statistics of the normalisation, as in the
    public implementation.
    """
    mean_over: Literal["all", "kept"] = "all"
    """Positions whose number divides the sum over a channel; `kept` as in the public
    implementation.
    """

    @model_validator(mode="after")
    def _ordered_and_odd(self) -> OutlierConfig:
        if self.quantiles[0] >= self.quantiles[1]:
            raise ValueError(
                f"quantiles={list(self.quantiles)}: the lower one comes first, such as [0.02, 0.98]"
            )
        if not self.kernels or any(side % 2 == 0 for pair in self.kernels for side in pair):
            raise ValueError(
                f"kernels={[list(pair) for pair in self.kernels]}: wanted pairs of odd sides, such "
                "as [[1, 3], [3, 5]]"
            )
        return self


class CropConfig(Section):
    """LPL on a random square window of each latent instead of all of it; unit: latent positions."""

    side: PositiveInt
    """Side of the window that is compared."""
    halo: NonNegativeInt = 4
    """Positions around the window that are decoded with it, as context, and cropped off the feature
    maps.
    """


LPL_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "diffusers_script": {
        "gate": {"timestep_below": 200},
        "normalize": {"over": "channels", "source": "target", "kind": "l2_norm"},
        "outliers": {
            "first_stage": 2,
            "source": "target",
            "zeroed_in_statistics": True,
            "mean_over": "kept",
        },
    },
}
"""Defaults that each preset changes; keys that a configuration sets itself take precedence."""


class LPLConfig(Section):
    """The Latent Perceptual Loss (arXiv 2411.04873); docs/lpl.md says what is established and what
    is our reading.
    """

    preset: Literal["paper", "diffusers_script"] = "paper"
    """Defaults of the paper as far as they are known, or of the one public implementation."""
    gate: GateConfig = GateConfig(snr_above=3.0)
    """Bound on the noise level of the samples that are compared."""
    weight: Optional[PositiveFloat] = None
    """Weight of LPL in the total loss; or set `target_fraction`."""
    target_fraction: Optional[Annotated[float, Field(ge=0.0, lt=1.0)]] = None
    """Fraction of the total loss that LPL is to have; its weight is measured over
    `calibration_steps`, then fixed.
    """
    calibration_steps: PositiveInt = 50
    """Updates from `start_step` on over which both losses are measured for target_fraction."""
    start_step: Union[NonNegativeInt, Annotated[float, Field(gt=0.0, lt=1.0)]] = 0
    """First step (from 0) with LPL: a whole number of steps, or a fraction of `steps`, such as
    0.875 (rounded down).  A run's resolved configuration holds the number of steps.
    """
    ramp_steps: NonNegativeInt = 0
    """Steps over which the weight grows linearly from 0."""
    noise_weighting: WeightingConfig = WeightingConfig()
    """Weight of each noise level inside the gate; kind min_snr is the public implementation's
    `lpl_scale`.
    """
    stages: Optional[list[Name]] = None
    """Decoder stages to compare, of `mid`, `up0`, `up1` ...; absent: all of them."""
    distance: Literal["mse", "l1"] = "mse"
    """Distance of two feature maps."""
    normalize: Optional[NormalizeConfig] = NormalizeConfig()
    """Normalisation of the features; null: none."""
    depth_weights: Union[Literal["inverse_resolution", "uniform"], tuple[NonNegativeFloat, ...]] = (
        "inverse_resolution"
    )
    """Weight omega of each stage: 1 / its upscaling, 1, or a list with a number for each stage."""
    outliers: Optional[OutlierConfig] = OutlierConfig()
    """Mask of outliers; null: none."""
    sample_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Fraction of the gated samples that is decoded, drawn at random and weighted by its inverse:
    unbiased and cheaper.
    """
    crop: Optional[CropConfig] = None
    """Random window that is decoded and compared; absent: the whole latent."""
    decoder: Optional[PathText] = None
    """Folder of another autoencoder for the same latents whose (smaller) decoder computes the
    features; absent: that of `autoencoder`.
    """
    chunk_size: PositiveInt = 8
    """Samples per forward of the decoder; its memory does not depend on the batch beyond this."""
    activation_checkpointing: bool = True
    """Keep only the input of each resnet, attention and upsampler of the decoder, and recompute the
    rest in backward.
    """
    compile: bool = False
    """Compile the decoder's layers (torch.compile)."""
    decoder_precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Arithmetic of the decoder."""

    @property
    def first_weighted_step(self) -> int:
        """First step at which LPL is part of the total loss."""
        assert isinstance(self.start_step, int), "TrainConfig resolves a fraction of its steps"
        return self.start_step + (self.calibration_steps if self.weight is None else 0)

    def starting_within(self, steps: int) -> LPLConfig:
        """Copy in which a `start_step` that is a fraction of `steps` is a number of steps, rounded
        down in exact decimal arithmetic.
        """
        if isinstance(self.start_step, int):
            return self
        return self.model_copy(update={"start_step": int(Fraction(repr(self.start_step)) * steps)})

    @field_validator("start_step", mode="before")
    @classmethod
    def _steps_or_a_fraction(cls, start: Any) -> Any:
        number = -1.0
        if isinstance(start, (int, float, str)) and not isinstance(start, bool):
            with suppress(ValueError, OverflowError):
                number = float(start)
        if not (
            0 < number < 1 or (number >= 0 and number.is_integer() and not isinstance(start, float))
        ):
            raise ValueError(
                f"{start!r:.60}: wanted a whole number of steps such as 1050, or a fraction of "
                "`steps` between 0 and 1 such as 0.875"
            )
        return start if not isinstance(start, str) else number if number % 1 else int(number)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        filled = dict(raw)
        for key, section in LPL_PRESETS.get(str(raw.get("preset", "paper")), {}).items():
            own = raw.get(key, {})
            if key != "gate" and isinstance(
                own, dict
            ):  # a gate is one of three spellings: never two halves of it
                filled[key] = {**section, **own}
            else:
                filled.setdefault(key, section)
        return filled

    @model_validator(mode="after")
    def _one_weight(self) -> LPLConfig:
        if (self.weight is None) == (self.target_fraction is None):
            raise ValueError(
                f"set exactly one of weight and target_fraction; found weight={self.weight}, "
                f"target_fraction={self.target_fraction}"
            )
        return self
