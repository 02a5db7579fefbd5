"""Creates DeepSpeed's engine: checks its version, fixes settings that the trainer relies on, and
undoes changes that it makes to the whole process.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lpl_pretrain.config.schema import ParallelConfig
from lpl_pretrain.config.zero import zero_settings
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.parallel.precision import AutocastWrapper
from lpl_pretrain.runtime.world import World

VERSION = "0.19."
"""Prefix of the DeepSpeed versions whose memory layout `ZeroStrategy` knows."""
INSTALL_COMMAND = "pip install 'deepspeed>=0.19.8,<0.20'"
ENGINE_SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "communication_data_type": "fp32",
    "zero_allow_untested_optimizer": True,
    # DeepSpeed would compile its own CPU Adam at the first use, for minutes.
    "zero_force_ds_cpu_optimizer": False,
}


class ScopedLinearPatch:
    """Context in which `torch.nn.functional.linear` is DeepSpeed's.

    Stage 3 replaces that function in the whole process, by one that does not keep gathered weights
    alive.  Here the replacement is active only while the model runs: other networks, such as LPL's
    decoder, keep torch's function, and so do compiled blocks.  Compiled for a GPU by torch 2.11,
    DeepSpeed's function gave input gradients that were a third off (docs/log.md).
    """

    def __init__(self, original: Callable[..., Tensor], *, active: bool) -> None:
        """Remembers the function that the engine has installed, and installs `original` again.

        With `active=False` the context has no effect.
        """
        self._original = original
        self._replacement = nn.functional.linear if active else original
        nn.functional.linear = original

    def __enter__(self) -> None:
        nn.functional.linear = self._replacement

    def __exit__(self, *error: object) -> None:
        nn.functional.linear = self._original


def zero_stage(config: ParallelConfig) -> int:
    """ZeRO stage of a `zero` strategy.  Raises ConfigError."""
    return zero_settings(config)["zero_optimization"]["stage"]


def settings_source(config: ParallelConfig) -> str:
    """Names the file or key that the engine's settings come from, for error messages."""
    return config.zero_config or f"parallel.strategy={config.strategy.value}"


def make_engine(
    config: ParallelConfig,
    autocast_model: AutocastWrapper,
    optimizer: torch.optim.Optimizer,
    world: World,
    fixed_settings: dict[str, Any],
) -> Any:
    """Collective.  Returns DeepSpeed's engine; `fixed_settings` override the configured ones.

    Raises ConfigError.
    """
    settings = {**zero_settings(config), **fixed_settings}
    deepspeed = _import_deepspeed(config)
    world.to_environment()
    # Such as fp16 on a device that has none.
    refusals = (ValueError, AssertionError, deepspeed.DeepSpeedConfigError)
    try:
        return deepspeed.initialize(model=autocast_model, optimizer=optimizer, config=settings)[0]
    except refusals as error:
        raise ConfigError(f"{settings_source(config)}: DeepSpeed refuses it: {error}") from error


def _import_deepspeed(config: ParallelConfig) -> Any:
    """Imports DeepSpeed without its log lines and without its compiled shared-memory collective.

    That collective takes a minute to compile on a CPU, and fails without a compiler.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"parallel.strategy={config.strategy.value}: deepspeed is not installed: "
            f"{INSTALL_COMMAND}"
        ) from error
    if not deepspeed.__version__.startswith(VERSION):
        raise ConfigError(
            f"parallel.strategy={config.strategy.value}: deepspeed {deepspeed.__version__} is "
            f"installed, wanted {VERSION}x, whose memory layout is known: {INSTALL_COMMAND}"
        )
    # Reading the original mapping runs a compiler for every operator.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed calls these functions at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..* is deprecated", FutureWarning)
    return deepspeed
