"""What a run can be told: frozen pydantic models, unknown keys refused, units in the names.

Suffixes: `_steps` optimizer updates, `_samples` training samples over all ranks, `_px` pixels, `_mib` mebibytes, `_s` seconds.
No torch in this room: a configuration is checked on a login node, before any accelerator is asked for.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Prediction(str, Enum):
    """What the denoiser is asked to predict (see diffusion/objective.py)."""

    EPS = "eps"
    V = "v"
    FLOW = "flow"


class ScheduleKind(str, Enum):
    """The path from data to noise (see diffusion/schedule.py)."""

    RECTIFIED_FLOW = "rectified_flow"
    LINEAR = "linear"
    SCALED_LINEAR = "scaled_linear"
    COSINE = "cosine"


class StrategyKind(str, Enum):
    LOCAL = "local"
    DDP = "ddp"
    FSDP2 = "fsdp2"
    ZERO = "zero"


class Precision(str, Enum):
    """Arithmetic of the denoiser; master weights, gradients' accumulation and EMA are float32 (float64 under fp64)."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP64 = "fp64"


class DataConfig(Section):
    folder: str
    """Encoded latents: a folder written by `lpl-pretrain encode`, with its index.json."""
    scaling: Literal["autoencoder", "per_channel"] = "autoencoder"
    """Latents are normalised by the autoencoder's shift and scaling factor, or by the folder's mean and std per channel."""
    verify: Literal["full", "sizes"] = "full"
    """At every start: read all shards once, shared out over the ranks (checksums, shapes, finite values), or compare sizes only."""
    posterior: Literal["sample", "mean"] = "sample"
    """Draw z0 from the stored posterior anew each time a sample is seen, or always use its mean."""


class DiTConfig(Section):
    """Diffusion transformer with adaLN-Zero (arXiv 2212.09748)."""

    kind: Literal["dit"] = "dit"
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    patch_size: PositiveInt = 2
    mlp_ratio: PositiveFloat = 4.0

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DiTConfig:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}: choose a width that is")
        return self


class ConditioningConfig(Section):
    label_dropout: Share = 0.1
    """Share of samples trained with the null class, for classifier-free guidance (arXiv 2207.12598)."""


class TimestepConfig(Section):
    distribution: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    """Of the normal whose logistic is t (logit_normal; arXiv 2403.03206, section 3.1)."""
    std: PositiveFloat = 1.0


class WeightingConfig(Section):
    kind: Literal["uniform", "min_snr"] = "uniform"
    gamma: PositiveFloat = 5.0
    """Clamp of the SNR (min_snr; arXiv 2303.09556, equation 7)."""


class DiffusionConfig(Section):
    prediction: Prediction
    schedule: ScheduleKind
    timesteps: TimestepConfig = TimestepConfig()
    weighting: WeightingConfig = WeightingConfig()


class GateConfig(Section):
    """LPL counts a sample only where its one-step estimate is sharp enough to compare. Exactly one of the three is set."""

    min_snr: Optional[PositiveFloat] = None
    """alpha_t^2 / sigma_t^2 at least this."""
    max_noise_level: Optional[PositiveFloat] = None
    """sigma_t / alpha_t at most this."""
    max_timestep: Optional[PositiveInt] = None
    """Integer timestep below this (discrete schedules only)."""

    @model_validator(mode="after")
    def _exactly_one(self) -> GateConfig:
        found = [name for name in ("min_snr", "max_noise_level", "max_timestep") if getattr(self, name) is not None]
        if len(found) != 1:
            raise ValueError(f"set exactly one of min_snr, max_noise_level, max_timestep; found {found or 'none'}")
        return self


class NormalizeConfig(Section):
    """On which scale the features of the two branches are compared (perceptual/normalize.py)."""

    over: Literal["space", "channels", "batch"] = "space"
    """Statistics over the positions of a channel, over the channels at a position, or over positions and all gated samples."""
    source: Literal["prediction", "target", "own"] = "prediction"
    """Whose statistics normalise both branches, or each branch by its own. The paper: the prediction's."""
    gradient: bool = True
    """Whether gradient flows through the prediction's statistics. A replication without it kept 16-39 % of the gain."""
    kind: Literal["std", "l2_norm"] = "std"
    """Subtract the mean and divide by the standard deviation; or divide by the L2 norm, as the public implementation does."""

    @model_validator(mode="after")
    def _norm_of_a_batch(self) -> NormalizeConfig:
        if (self.over, self.kind) == ("batch", "l2_norm"):
            raise ValueError("over=batch with kind=l2_norm: a norm over a batch grows with the batch; use kind=std")
        return self


class OutlierConfig(Section):
    """Which positions of a feature map are left out of the distance (docs/lpl.md)."""

    quantiles: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], Annotated[float, Field(gt=0.0, lt=1.0)]] = (0.02, 0.98)
    margin: NonNegativeFloat = 2.0
    """Standard deviations added outside the two quantiles."""
    source: Literal["target", "prediction"] = "target"
    first_stage: NonNegativeInt = 0
    """Stages before this one (counted in decoder order, mid is 0) are not masked."""
    kernels: tuple[tuple[PositiveInt, PositiveInt], ...] = ((1, 3), (1, 3), (1, 3), (3, 5))
    """Side of the dilation, then of the erosion of the kept positions, for each stage; the last pair goes for all deeper ones."""
    zeroed_in_statistics: bool = False
    """Masked positions count as zeros in the statistics of normalisation (the public implementation)."""
    mean_over: Literal["all", "kept"] = "all"
    """Positions that the sum over a channel is divided by; `kept` is the public implementation's."""

    @model_validator(mode="after")
    def _ordered_and_odd(self) -> OutlierConfig:
        if self.quantiles[0] >= self.quantiles[1]:
            raise ValueError(f"quantiles={list(self.quantiles)}: the lower one comes first, such as [0.02, 0.98]")
        if not self.kernels or any(side % 2 == 0 for pair in self.kernels for side in pair):
            raise ValueError(
                f"kernels={[list(pair) for pair in self.kernels]}: wanted pairs of odd sides, such as [[1, 3], [3, 5]]"
            )
        return self


class CropConfig(Section):
    """LPL on a random window of the latent instead of all of it; unit: latent positions."""

    side: PositiveInt
    """Side of the square that is compared."""
    halo: NonNegativeInt = 4
    """Positions around it that go through the decoder as its surroundings and are cut off the feature maps."""


LPL_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "diffusers_script": {
        "gate": {"max_timestep": 200},
        "normalize": {"over": "channels", "source": "target", "kind": "l2_norm"},
        "outliers": {"first_stage": 2, "source": "target", "zeroed_in_statistics": True, "mean_over": "kept"},
    },
}
"""What each preset changes of the defaults below; keys that a configuration sets itself win."""


class LPLConfig(Section):
    """The Latent Perceptual Loss (arXiv 2411.04873); see docs/lpl.md for what is established and what is our reading."""

    preset: Literal["paper", "diffusers_script"] = "paper"
    """The paper's loss as far as it is known, or the numbers of the one public implementation."""
    gate: GateConfig = GateConfig(min_snr=3.0)
    weight: Optional[PositiveFloat] = None
    """Explicit weight of LPL in the total loss; or `target_share`."""
    target_share: Optional[Annotated[float, Field(gt=0.0, lt=1.0)]] = None
    """Share of the total loss that LPL should have; its weight is measured over `calibration_steps`, then frozen."""
    calibration_steps: PositiveInt = 50
    start_step: NonNegativeInt = 0
    ramp_steps: NonNegativeInt = 0
    """The weight grows linearly from 0 over this many steps."""
    noise_weighting: WeightingConfig = WeightingConfig()
    """How much each noise level counts inside the gate; min_snr is the public implementation's `lpl_scale`."""
    stages: Optional[list[str]] = None
    """Decoder stages to compare, of `mid`, `up0`, `up1` ...; all of them when absent."""
    distance: Literal["mse", "l1"] = "mse"
    normalize: Optional[NormalizeConfig] = NormalizeConfig()
    """null: features are compared as they are."""
    depth_weights: Union[Literal["inverse_resolution", "uniform"], tuple[NonNegativeFloat, ...]] = "inverse_resolution"
    """omega: 1 / upscaling of each stage, 1, or a list with one number for each compared stage."""
    outliers: Optional[OutlierConfig] = OutlierConfig()
    """null: no position is left out."""
    sample_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the gated samples that go through the decoder, drawn at random, weighted by its inverse: unbiased and cheaper."""
    crop: Optional[CropConfig] = None
    decoder: Optional[str] = None
    """Folder of another autoencoder for the same latents, whose (smaller) decoder gives the features; absent: `autoencoder`."""
    chunk_size: PositiveInt = 8
    """Samples that are inside the decoder at once; memory does not grow beyond it."""
    activation_checkpointing: bool = True
    """Keep only the input of each resnet, attention and upsampler, and compute it again in backward."""
    compile: bool = False
    """torch.compile for the decoder's pieces."""
    decoder_precision: Literal["fp32", "bf16", "fp64"] = "fp32"

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        filled = dict(raw)
        for key, section in LPL_PRESETS.get(str(raw.get("preset", "paper")), {}).items():
            own = raw.get(key, {})
            if key != "gate" and isinstance(own, dict):  # a gate is one of three spellings: never two halves of it
                filled[key] = {**section, **own}
            else:
                filled.setdefault(key, section)
        return filled

    @model_validator(mode="after")
    def _one_weight(self) -> LPLConfig:
        if (self.weight is None) == (self.target_share is None):
            raise ValueError(
                f"set exactly one of weight and target_share; found weight={self.weight}, target_share={self.target_share}"
            )
        return self


class OptimizerConfig(Section):
    kind: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-4
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm; use a large number for none."""
    warmup_steps: NonNegativeInt = 0
    decay: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine to zero at `steps`."""


class BatchConfig(Section):
    global_batch_size: PositiveInt
    """Samples per optimizer update, over all ranks."""
    micro_batch_size: Optional[PositiveInt] = None
    """Samples per rank per forward; absent: the whole share of a rank. Accumulation follows from the two and the world size."""


class ParallelConfig(Section):
    strategy: StrategyKind = StrategyKind.LOCAL
    zero_config: Optional[str] = None
    """DeepSpeed JSON (configs/zero/*.json) when strategy is zero: engine tuning only, never batch, precision or clipping."""
    precision: Precision = Precision.FP32

    @model_validator(mode="after")
    def _zero_needs_json(self) -> ParallelConfig:
        if (self.strategy is StrategyKind.ZERO) != (self.zero_config is not None):
            raise ValueError(
                f"zero_config={self.zero_config!r} with strategy={self.strategy.value!r}: "
                "name a DeepSpeed JSON, such as configs/zero/zero2.json, with strategy zero and only with it"
            )
        return self


class EMAConfig(Section):
    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    warmup: bool = True
    """Use min(decay, (1 + step) / (10 + step)), so that early averages are not dominated by the initial weights."""


class CheckpointConfig(Section):
    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 3
    keep_every_steps: Optional[PositiveInt] = None
    """Checkpoints at multiples of this are never removed."""


class WandbConfig(Section):
    mode: Literal["disabled", "online", "offline"] = "disabled"
    project: str = "lpl-pretrain"
    entity: Optional[str] = None


class LogConfig(Section):
    every_steps: PositiveInt = 50
    wandb: WandbConfig = WandbConfig()


class TrainConfig(Section):
    name: str
    run_dir: Optional[str] = None
    """Where everything of the run goes; absent: runs/<name>."""
    seed: NonNegativeInt = 0
    steps: PositiveInt
    """Optimizer updates in all."""
    autoencoder: str
    """Folder of a diffusers autoencoder (families: config/autoencoder.py), or `asset:NAME` for one that ships with the package."""
    data: DataConfig
    model: DiTConfig
    conditioning: ConditioningConfig = ConditioningConfig()
    diffusion: DiffusionConfig
    lpl: Optional[LPLConfig] = None
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig
    parallel: ParallelConfig = ParallelConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


class EncodeConfig(Section):
    """Pictures to latents."""

    source: Union[str, list[str]]
    """An image folder (`class/name.png`), or WebDataset tars of png/jpg/webp + cls/txt/json; `asset:` works too."""
    output: str
    autoencoder: str
    resolution_px: PositiveInt
    """Pictures are resized (Lanczos) to cover a square of this side, then cropped at the centre."""
    batch_size: PositiveInt = 32
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the encoder; moments are stored in fp16."""
    shard_max_mib: PositiveFloat = 256.0


class SamplerConfig(Section):
    kind: Literal["ddim", "euler", "heun"]
    steps: PositiveInt = 50


class EvaluateConfig(Section):
    """One evaluation protocol: everything that the score depends on."""

    name: str
    images: PositiveInt
    batch_size: PositiveInt = 64
    seed: NonNegativeInt = 0
    weights: Literal["ema", "raw"] = "ema"
    sampler: SamplerConfig
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
