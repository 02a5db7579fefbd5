"""What the Latent Perceptual Loss can be told: which samples, which features, on which scale, how
much, and how cheaply.

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
    """LPL counts a sample only where its one-step estimate is sharp enough to compare. Exactly one
    of the three is set.
    """

    snr_above: Optional[PositiveFloat] = None
    """alpha_t^2 / sigma_t^2 at least this."""
    noise_level_below: Optional[PositiveFloat] = None
    """sigma_t / alpha_t at most this."""
    timestep_below: Optional[PositiveInt] = None
    """Integer timestep below this (discrete schedules only)."""

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
    """On which scale the features of the two branches are compared (losses/lpl/normalize.py)."""

    over: Literal["space", "channels", "batch"] = "space"
    """Statistics over the positions of a channel, over the channels at a position, or over
    positions and all gated samples.
    """
    source: Literal["prediction", "target", "own"] = "prediction"
    """Whose statistics normalise both branches, or each branch by its own. The paper: the
    prediction's.
    """
    gradient: bool = True
    """Whether gradient flows through the prediction's statistics. A replication without it kept
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
    """Which positions of a feature map are left out of the distance (docs/lpl.md)."""

    quantiles: tuple[
        Annotated[float, Field(gt=0.0, lt=1.0)], Annotated[float, Field(gt=0.0, lt=1.0)]
    ] = (0.02, 0.98)
    margin: NonNegativeFloat = 2.0
    """Standard deviations added outside the two quantiles."""
    source: Literal["target", "prediction"] = "target"
    first_stage: NonNegativeInt = 0
    """Stages before this one (counted in decoder order, mid is 0) are not masked."""
    kernels: tuple[tuple[PositiveInt, PositiveInt], ...] = ((1, 3), (1, 3), (1, 3), (3, 5))
    """Side of the dilation, then of the erosion of the kept positions, for each stage; the last
    pair goes for all deeper ones.
    """
    zeroed_in_statistics: bool = False
    """Masked positions count as zeros in the statistics of normalisation (the public
    implementation).
    """
    mean_over: Literal["all", "kept"] = "all"
    """Positions that the sum over a channel is divided by; `kept` is the public implementation's.
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
    """LPL on a random window of the latent instead of all of it; unit: latent positions."""

    side: PositiveInt
    """Side of the square that is compared."""
    halo: NonNegativeInt = 4
    """Positions around it that go through the decoder as its surroundings and are cut off the
    feature maps.
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
"""What each preset changes of the defaults below; keys that a configuration sets itself win."""


class LPLConfig(Section):
    """The Latent Perceptual Loss (arXiv 2411.04873); see docs/lpl.md for what is established and
    what is our reading.
    """

    preset: Literal["paper", "diffusers_script"] = "paper"
    """The paper's loss as far as it is known, or the numbers of the one public implementation."""
    gate: GateConfig = GateConfig(snr_above=3.0)
    weight: Optional[PositiveFloat] = None
    """Explicit weight of LPL in the total loss; or `target_fraction`."""
    target_fraction: Optional[Annotated[float, Field(ge=0.0, lt=1.0)]] = None
    """Share of the total loss that LPL should have; its weight is measured over
    `calibration_steps`, then frozen.
    """
    calibration_steps: PositiveInt = 50
    start_step: Union[NonNegativeInt, Annotated[float, Field(gt=0.0, lt=1.0)]] = 0
    """First step (from 0) with LPL: a whole number of steps, or a fraction of `steps`, such as
    0.875 (rounded down).  A run's resolved configuration holds the number of steps.
    """
    ramp_steps: NonNegativeInt = 0
    """The weight grows linearly from 0 over this many steps."""
    noise_weighting: WeightingConfig = WeightingConfig()
    """How much each noise level counts inside the gate; min_snr is the public implementation's
    `lpl_scale`.
    """
    stages: Optional[list[Name]] = None
    """Decoder stages to compare, of `mid`, `up0`, `up1` ...; all of them when absent."""
    distance: Literal["mse", "l1"] = "mse"
    normalize: Optional[NormalizeConfig] = NormalizeConfig()
    """null: features are compared as they are."""
    depth_weights: Union[Literal["inverse_resolution", "uniform"], tuple[NonNegativeFloat, ...]] = (
        "inverse_resolution"
    )
    """omega: 1 / upscaling of each stage, 1, or a list with one number for each compared stage."""
    outliers: Optional[OutlierConfig] = OutlierConfig()
    """null: no position is left out."""
    sample_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the gated samples that go through the decoder, drawn at random, weighted by its
    inverse: unbiased and cheaper.
    """
    crop: Optional[CropConfig] = None
    decoder: Optional[PathText] = None
    """Folder of another autoencoder for the same latents, whose (smaller) decoder gives the
    features; absent: `autoencoder`.
    """
    chunk_size: PositiveInt = 8
    """Samples that are inside the decoder at once; memory does not grow beyond it."""
    activation_checkpointing: bool = True
    """Keep only the input of each resnet, attention and upsampler, and compute it again in
    backward.
    """
    compile: bool = False
    """torch.compile for the decoder's pieces."""
    decoder_precision: Literal["fp32", "bf16", "fp64"] = "fp32"

    @property
    def first_weighted_step(self) -> int:
        """The first step whose total loss LPL is a part of."""
        assert isinstance(self.start_step, int), "TrainConfig resolves a fraction of its steps"
        return self.start_step + (self.calibration_steps if self.weight is None else 0)

    def starting_within(self, steps: int) -> LPLConfig:
        """With `start_step` in steps of a run of so many; a fraction of them is rounded down, in
        exact decimal arithmetic.
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
                f"{start!r:.60}: wanted a whole number of steps such as 1050, or a fraction "
                "of `steps` "
                "between 0 and 1 such as 0.875"
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
