"""The `parallel` section: sharding, precision, activation checkpointing and compilation."""

from __future__ import annotations

from enum import Enum
from typing import Optional

from pydantic import PositiveInt, model_validator

from lpl_pretrain.config.base import PathText, Section

FSDP2_KEYS = ("shard_size", "reshard_after_forward", "cpu_offload")


class StrategyKind(str, Enum):
    """Division of parameters, gradients and optimizer states among the ranks."""

    LOCAL = "local"
    DDP = "ddp"
    FSDP2 = "fsdp2"
    ZERO = "zero"
    """DeepSpeed at the ZeRO stage of the file `zero_config`."""
    ZERO1 = "zero1"
    """DeepSpeed's ZeRO stage 1, 2 or 3, with built-in tuning unless `zero_config` names a file of
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
        """ZeRO stage in the strategy's name; None where the DeepSpeed JSON has it, and for other
        strategies.
        """
        if not self.is_zero or self is StrategyKind.ZERO:
            return None
        return int(self.value[-1])


class Precision(str, Enum):
    """Arithmetic of the denoiser.  Master weights, gradient accumulation and EMA are float32
    (float64 under fp64).
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    """Arithmetic with a dynamic loss scale; for GPUs without bf16."""
    FP8 = "fp8"
    """bf16, with float8 products in the linear layers of the blocks (torchao)."""
    FP64 = "fp64"


class ActivationCheckpointing(str, Enum):
    """Activations of a block that are recomputed in backward instead of kept."""

    NONE = "none"
    BLOCKS = "blocks"
    SELECTIVE = "selective"


class ParallelConfig(Section):
    """Sharding, precision and memory of the denoiser's training."""

    strategy: StrategyKind = StrategyKind.LOCAL
    """Division of parameters, gradients and optimizer states among the ranks."""
    zero_config: Optional[PathText] = None
    """DeepSpeed JSON (configs/zero/*.json) with engine tuning only, never batch, precision or
    clipping.  `zero` needs one; `zero1`, `zero2` and `zero3` have built-in tuning.
    `lpl-pretrain zero-config` adapts a file that was written for another trainer.
    """
    precision: Precision = Precision.FP32
    """Arithmetic of the denoiser; master weights are float32."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.NONE
    """Denoiser: `blocks` keeps the input of each block only, `selective` also the outputs of matrix
    products and attention.
    """
    checkpoint_every_blocks: PositiveInt = 1
    """Apply activation checkpointing to every n-th block."""
    shard_size: Optional[PositiveInt] = None
    """fsdp2: ranks that shard one copy of the model, which other groups of ranks replicate (HSDP);
    absent: all ranks.
    """
    reshard_after_forward: bool = True
    """fsdp2: free a block's gathered parameters after forward and gather them again in backward:
    less memory, more traffic.
    """
    cpu_offload: bool = False
    """fsdp2: keep parameters, gradients and moments in host memory and run the optimizer there."""
    compile: bool = False
    """Compile each block (torch.compile); the first step takes a minute or more."""

    @model_validator(mode="after")
    def _zero_config_fits_the_strategy(self) -> ParallelConfig:
        strategy = self.strategy
        if self.zero_config is not None and not strategy.is_zero:
            raise ValueError(
                f"zero_config={self.zero_config!r} with strategy={strategy.value!r}: a DeepSpeed "
                "JSON is for the strategies zero, zero1, zero2 and zero3: name one of them, or "
                "remove zero_config"
            )
        if self.zero_config is None and strategy is StrategyKind.ZERO:
            raise ValueError(
                "zero_config=None with strategy='zero': use strategy zero1, zero2 or zero3, or "
                "name a DeepSpeed JSON, such as configs/zero/zero2.json"
            )
        if strategy.is_zero and self.precision in (Precision.FP64, Precision.FP8):
            raise ValueError(
                f"precision={self.precision.value!r} with strategy={strategy.value!r}: DeepSpeed "
                "keeps float32 masters and has no float8; use bf16, fp16 or fp32, or another "
                "strategy"
            )
        return self

    @model_validator(mode="after")
    def _fsdp2_keys_need_fsdp2(self) -> ParallelConfig:
        if self.strategy is StrategyKind.FSDP2:
            return self
        for name in FSDP2_KEYS:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}={value} with strategy={self.strategy.value!r}: this key is for "
                    "strategy fsdp2; tuning of DeepSpeed belongs into its JSON"
                )
        return self
