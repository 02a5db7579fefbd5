"""What a run can be told: frozen pydantic models, unknown keys refused, units in the names.

Suffixes: `_steps` optimizer updates, `_samples` training samples over all ranks, `_px` pixels,
`_mib` mebibytes, `_s` seconds. No torch in this room: a configuration is checked on a login node,
before any accelerator is asked for.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Annotated, Literal, Optional, Union

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lpl_pretrain.config.base import (
    Name,
    OnError,
    PathText,
    Section,
    Share,
    UnexpandedPath,
    WeightingConfig,
)
from lpl_pretrain.config.encode import TextEncoderConfig
from lpl_pretrain.config.init_from import InitConfig
from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.config.model import ModelConfig
from lpl_pretrain.config.preflight import PreflightConfig


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
    """DeepSpeed, at the stage that `zero_config` names."""
    ZERO1 = "zero1"
    """DeepSpeed's ZeRO stage 1, 2 or 3; with built-in tuning unless `zero_config` names a file of
    that stage.
    """
    ZERO2 = "zero2"
    ZERO3 = "zero3"

    @property
    def is_zero(self) -> bool:
        """Whether the strategy runs in DeepSpeed's engine."""
        return self.value.startswith("zero")

    @property
    def zero_stage(self) -> Optional[int]:
        """ZeRO stage that the name says; None: the DeepSpeed JSON says it, or the strategy is not
        ZeRO.
        """
        return int(self.value[-1]) if self.is_zero and self is not StrategyKind.ZERO else None


class Precision(str, Enum):
    """Arithmetic of the denoiser; master weights, gradients' accumulation and EMA are float32
    (float64 under fp64).
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    """With a dynamic loss scale; for GPUs without bf16."""
    FP8 = "fp8"
    """bf16, with float8 products in the linear layers of the blocks (torchao)."""
    FP64 = "fp64"


class CacheConfig(Section):
    """Where shards of a remote folder are kept."""

    folder: UnexpandedPath = "~/.cache/lpl_pretrain"
    max_gib: PositiveFloat = 100.0
    """The shards that were not used for the longest time make room for new ones."""
    retries: NonNegativeInt = 6
    """Of a download that fails or arrives damaged, after 1, 2, 4 ... seconds."""


class DataConfig(Section):
    folder: Union[PathText, dict[PathText, PositiveFloat]]
    """Encoded latents: a folder written by `lpl-pretrain encode` or an fsspec URL of one; several
    as `folder: weight`.
    """
    lanes: PositiveInt = 16
    """Stretches of the data that are read side by side (data/lanes.py): a batch mixes all of them.
    """
    shuffle_block_samples: PositiveInt = 1024
    """Samples that are shuffled among each other inside a lane."""
    flips: bool = False
    """Take the mirrored picture's latent for half of the samples; wants a folder encoded with
    `flips: true`.
    """
    workers: PositiveInt = 1
    """Threads that read batches ahead."""
    on_error: OnError = OnError.STOP
    max_skipped_fraction: Share = 0.001
    """With on_error skip: more damaged samples than this share of the data stop the run."""
    cache: CacheConfig = CacheConfig()
    scaling: Literal["autoencoder", "per_channel"] = "autoencoder"
    """Latents are normalised by the autoencoder's shift and scaling factor, or by the folder's mean
    and std per channel.
    """
    verify: Literal["full", "sizes"] = "full"
    """At every start: read all shards once, shared out over the ranks (checksums, shapes, finite
    values), or compare sizes only.
    """
    posterior: Literal["sample", "mean"] = "sample"
    """Draw z0 from the stored posterior anew each time a sample is seen, or always use its mean."""


class ConditioningConfig(Section):
    label_dropout: Share = 0.1
    """Share of samples trained with the null class, for classifier-free guidance (arXiv
    2207.12598).
    """
    text_encoders: tuple[Union[Name, tuple[Name, ...]], ...] = ()
    """Text encoders of the data folder (mmdit): behind each other, or side by side in a group:
    [[clip_l, clip_g], t5].
    """
    online_encoders: dict[Name, TextEncoderConfig] = {}
    """Those of `text` that run while training, on the data's captions, by name; the others'
    embeddings are read from the folder.
    """
    text_dropout: Share = 0.1
    """Share of samples trained with the empty caption's embeddings."""


class TimestepConfig(Section):
    """Drawn by strata over the global batch whatever the distribution (diffusion/timesteps.py)."""

    distribution: Literal["uniform", "logit_normal", "mode", "cosmap"] = "uniform"
    mean: float = 0.0
    """Of the normal whose logistic is t (logit_normal; arXiv 2403.03206, section 3.1)."""
    std: PositiveFloat = 1.0
    mode_scale: Annotated[float, Field(ge=-1.0, le=2 / (math.pi - 2))] = 1.29
    """Of mode: positive favours the middle, negative the ends (arXiv 2403.03206, equation 20)."""
    shift: PositiveFloat = 1.0
    """Above 1: more noise, as more pixels want it: sqrt(pixels / those of the reference);
    rectified_flow (arXiv 2403.03206, 23).
    """


class DiffusionConfig(Section):
    prediction: Prediction
    schedule: ScheduleKind
    timesteps: TimestepConfig = TimestepConfig()
    weighting: WeightingConfig = WeightingConfig()
    zero_terminal_snr: bool = False
    """Rescale a discrete schedule so that its last timestep is pure noise (arXiv 2305.08891,
    algorithm 1); for v only.
    """


class OnSpike(str, Enum):
    """What becomes of an update whose gradient norm or loss spikes (trainer/spikes.py)."""

    IGNORE = "ignore"
    STOP = "stop"
    SKIP = "skip"
    ROLLBACK = "rollback"


class SpikeConfig(Section):
    """What counts as a spike, and how many a run may have; unused with optimizer.on_spike=ignore."""

    window_updates: PositiveInt = 128
    """The last applied updates, whose median and MAD give the bound."""
    min_updates: Annotated[int, Field(ge=8)] = 32
    """Nothing is a spike while the window holds fewer."""
    threshold_mads: PositiveFloat = 8.0
    """A spike is this many 1.4826 * MAD above the median, both of logarithms."""
    min_factor: Annotated[float, Field(gt=1.0)] = 2.0
    """A spike is also at least this many times the median."""
    noise_levels: Annotated[int, Field(ge=1, le=64)] = 8
    """Equal parts of the timestep distribution whose losses are watched one by one."""
    skip_updates: PositiveInt = 1
    """rollback: updates, from that of the spike on, whose samples are jumped over."""
    max_events: NonNegativeInt = 20
    """skip and rollback: more spikes than this in one run stop it."""

    @model_validator(mode="after")
    def _window_can_fill(self) -> SpikeConfig:
        if self.min_updates > self.window_updates:
            raise ValueError(
                f"min_updates={self.min_updates} with window_updates={self.window_updates}: "
                "the window would never hold enough; lower min_updates or raise window_updates"
            )
        return self


class OptimizerConfig(Section):
    kind: Literal["adamw", "muon", "sgd"] = "adamw"
    """muon: for the matrices of the blocks, AdamW for everything else (trainer/optimizer.py)."""
    lr: PositiveFloat = 1e-4
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    momentum: Share = 0.95
    """Of muon."""
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm; use a large number for none."""
    warmup_steps: NonNegativeInt = 0
    lr_schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    """After the warm-up: constant, a cosine to zero at `steps`, or 1 / sqrt of the step from
    `decay_from_steps` on.
    """
    decay_from_steps: Optional[PositiveInt] = None
    """inverse_sqrt: lr / sqrt(max(step / this, 1)) (arXiv 2312.02696, equation 67)."""
    on_nonfinite: OnError = OnError.STOP
    """A loss or gradient that is not finite: stop, with parameters as before; or leave that update
    out, name it and go on.
    """
    max_skipped_updates: NonNegativeInt = 10
    """With on_nonfinite skip: more left-out updates than this in one run stop it."""
    on_spike: OnSpike = OnSpike.IGNORE
    """A gradient norm or loss far above those of the last updates: ignore it; stop, with parameters
    as before; skip: leave that update out; rollback: restore the newest checkpoint and go on behind
    the samples of that update.
    """
    spike: SpikeConfig = SpikeConfig()

    @model_validator(mode="after")
    def _inverse_sqrt_starts_somewhere(self) -> OptimizerConfig:
        if (self.lr_schedule == "inverse_sqrt") != (self.decay_from_steps is not None):
            raise ValueError(
                f"decay_from_steps={self.decay_from_steps} with lr_schedule={self.lr_schedule}: set "
                "it with inverse_sqrt and only with it"
            )
        return self


class BatchConfig(Section):
    global_batch_size: PositiveInt
    """Samples per optimizer update, over all ranks."""
    micro_batch_size: Optional[PositiveInt] = None
    """Samples per rank per forward; absent: the whole share of a rank. Accumulation follows from
    the two and the world size.
    """


class ActivationCheckpointing(str, Enum):
    """What of a block's forward is computed again in backward instead of being kept."""

    NONE = "none"
    BLOCKS = "blocks"
    SELECTIVE = "selective"


class ParallelConfig(Section):
    strategy: StrategyKind = StrategyKind.LOCAL
    zero_config: Optional[PathText] = None
    """DeepSpeed JSON (configs/zero/*.json): engine tuning only, never batch, precision or clipping.
    `zero` needs one; `zero1`, `zero2` and `zero3` have built-in tuning.  `lpl-pretrain zero-config`
    adapts a file that was written elsewhere."""
    precision: Precision = Precision.FP32
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.NONE
    """Of the denoiser: `blocks` keeps what enters a block, `selective` also the outputs of matrix
    products and attention.
    """
    checkpoint_every_blocks: PositiveInt = 1
    """With activation checkpointing: every second, every third block ... only."""
    shard_size: Optional[PositiveInt] = None
    """fsdp2: ranks that share one copy of the model, and replicate what other groups hold (HSDP);
    absent: all ranks share one.
    """
    reshard_after_forward: bool = True
    """fsdp2: release a block's gathered parameters after forward and gather them again in backward:
    less memory, more traffic.
    """
    cpu_offload: bool = False
    """fsdp2: parameters, gradients and moments lie in the host's memory, and the optimizer runs
    there.
    """
    compile: bool = False
    """Compile each block (torch.compile); the first step takes a minute or more."""

    @model_validator(mode="after")
    def _zero_needs_json(self) -> ParallelConfig:
        strategy = self.strategy
        if self.zero_config is not None and not strategy.is_zero:
            raise ValueError(
                f"zero_config={self.zero_config!r} with strategy={strategy.value!r}: a DeepSpeed "
                "JSON is for the strategies "
                "zero, zero1, zero2 and zero3: name one of them, or remove zero_config"
            )
        if self.zero_config is None and strategy is StrategyKind.ZERO:
            raise ValueError(
                "zero_config=None with strategy='zero': use strategy zero1, zero2 or zero3, or "
                "name a DeepSpeed JSON, "
                "such as configs/zero/zero2.json"
            )
        if strategy.is_zero and self.precision in (Precision.FP64, Precision.FP8):
            raise ValueError(
                f"precision={self.precision.value!r} with strategy={strategy.value!r}: DeepSpeed "
                "keeps float32 masters and "
                "knows no float8; use bf16, fp16 or fp32, or another strategy"
            )
        own = ("shard_size", "reshard_after_forward", "cpu_offload")
        asked = [
            name for name in own if getattr(self, name) != type(self).model_fields[name].default
        ]
        if asked and strategy is not StrategyKind.FSDP2:
            raise ValueError(
                f"{asked[0]}={getattr(self, asked[0])} with strategy={strategy.value!r}: it is for "
                "strategy fsdp2; "
                "DeepSpeed's own tuning belongs into its JSON"
            )
        return self


class EMAConfig(Section):
    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    warmup: bool = True
    """Use min(decay, (1 + step) / (10 + step)), so that early averages are not dominated by the
    initial weights.
    """
    sigma_rel: tuple[Annotated[float, Field(gt=0.01, lt=0.28)], ...] = ()
    """Relative standard deviations of power-function averages that are tracked beside it (arXiv
    2312.02696, section 3).
    """
    snapshot_every_steps: Optional[PositiveInt] = None
    """Keep the power-function averages of these steps for good: `export --sigma-rel` makes averages
    of any length from them.
    """

    @model_validator(mode="after")
    def _snapshots_hold_something(self) -> EMAConfig:
        if self.snapshot_every_steps is not None and not self.sigma_rel:
            raise ValueError(
                f"snapshot_every_steps={self.snapshot_every_steps} without sigma_rel: there is "
                "nothing to keep; add sigma_rel: [0.05, 0.10]"
            )
        if len({power_kind(sigma_rel) for sigma_rel in self.sigma_rel}) < len(self.sigma_rel):
            raise ValueError(
                f"sigma_rel={list(self.sigma_rel)}: two differ by less than 0.001; leave one out"
            )
        return self


def power_kind(sigma_rel: float) -> str:
    """How a power-function average is called in checkpoints and by `weights`."""
    return f"ema_power_{sigma_rel:.3f}"


class CheckpointConfig(Section):
    every_steps: PositiveInt = 1000
    asynchronous: bool = True
    """Copy the state to the host's memory (16 bytes a parameter that the rank owns) and go on
    training while it is written.
    """
    keep_last: PositiveInt = 3
    keep_every_steps: Optional[PositiveInt] = None
    """Checkpoints at multiples of this are never removed."""


class WandbConfig(Section):
    mode: Literal["disabled", "online", "offline"] = "disabled"
    project: Name = "lpl-pretrain"
    entity: Optional[Name] = None


class LogConfig(Section):
    every_steps: PositiveInt = 50
    sample_indices: bool = False
    """Also write down which samples each update was made of; `lpl-pretrain audit` compares that
    with what it should have been.
    """
    wandb: WandbConfig = WandbConfig()


class WatchdogConfig(Section):
    """When no step has ended for `factor` times the median of the last ones, and for at least
    `at_least_s`, the run hangs.

    Every rank then writes the stacks of its threads (runtime/watchdog.py), and a job of `launch`
    does what its profile says.
    """

    factor: Annotated[float, Field(gt=1.0)] = 20.0
    at_least_s: PositiveFloat = 480.0
    """Less than the 10 minutes after which NCCL would abort and say less; more than the longest
    step, such as one that saves.
    """


class TrainConfig(Section):
    name: Name
    run_dir: Optional[PathText] = None
    """Where everything of the run goes; absent: runs/<name>."""
    seed: NonNegativeInt = 0
    steps: PositiveInt
    """Optimizer updates in all."""
    autoencoder: PathText
    """Folder of a diffusers autoencoder (families: config/autoencoder.py), or `asset:NAME` for one
    that ships with the package.
    """
    data: DataConfig
    model: ModelConfig
    init_from: Optional[InitConfig] = None
    """Weights to begin with; absent: fresh ones."""
    conditioning: ConditioningConfig = ConditioningConfig()
    diffusion: DiffusionConfig
    lpl: Optional[LPLConfig] = None
    """null, or a target_fraction of 0: without it."""
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig
    parallel: ParallelConfig = ParallelConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    inline_evaluation: Optional[PathText] = None
    """A protocol (configs/evaluate/*.yaml) that scores every checkpoint while training waits; for
    single machines.  Elsewhere `lpl-pretrain evaluate --watch` does so in processes of its own.
    """
    log: LogConfig = LogConfig()
    preflight: Optional[PreflightConfig] = PreflightConfig()
    """null: training begins without a look at its nodes."""
    watchdog: Optional[WatchdogConfig] = WatchdogConfig()
    """null: nobody watches."""

    @field_validator("lpl")
    @classmethod
    def _no_share_is_no_lpl(
        cls, lpl: Optional[LPLConfig], fields: ValidationInfo
    ) -> Optional[LPLConfig]:
        """The baseline of a sweep over shares decodes nothing.  A start as a fraction of `steps`
        becomes a number of steps.
        """
        if lpl is None or lpl.target_fraction == 0:
            return None
        return lpl.starting_within(fields.data["steps"]) if "steps" in fields.data else lpl
