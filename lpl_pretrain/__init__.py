"""Pretraining of latent diffusion models with the Latent Perceptual Loss.

The names below are the public interface; they are imported when they are first used, so that
`import lpl_pretrain` loads no torch.

LatentPerceptualLoss  the loss as a module; `lpl_from_autoencoder` builds one
LPLOutput             result of its call
lpl_from_autoencoder  the loss on the decoder of a diffusers autoencoder
load_config           reads a configuration, `load_config(TrainConfig, path, overrides)`
TrainConfig           configuration of a run
LPLConfig             its `lpl` section
train                 trains or resumes a run, `train(config) -> RunDir`
RunDir                paths of a run's files
LPLError              base of all errors that a user can act on
ConfigError           bad input: key, value found, value wanted, remedy
resolve_path          path of `asset:NAME`, `package:NAME/PATH` and `~`
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = [
    "ConfigError",
    "LPLConfig",
    "LPLError",
    "LPLOutput",
    "LatentPerceptualLoss",
    "RunDir",
    "TrainConfig",
    "load_config",
    "lpl_from_autoencoder",
    "resolve_path",
    "train",
]
_MODULES = {
    "ConfigError": "errors",
    "LPLConfig": "config.lpl",
    "LPLError": "errors",
    "LPLOutput": "losses.lpl.loss",
    "LatentPerceptualLoss": "losses.lpl.loss",
    "RunDir": "config.rundir",
    "TrainConfig": "config.schema",
    "load_config": "config.load",
    "lpl_from_autoencoder": "losses.lpl.from_autoencoder",
    "resolve_path": "config.load",
    "train": "cli.train",
}
"""Public name -> module that defines it."""

if TYPE_CHECKING:
    from lpl_pretrain.cli.train import train
    from lpl_pretrain.config.load import load_config, resolve_path
    from lpl_pretrain.config.lpl import LPLConfig
    from lpl_pretrain.config.rundir import RunDir
    from lpl_pretrain.config.schema import TrainConfig
    from lpl_pretrain.errors import ConfigError, LPLError
    from lpl_pretrain.losses.lpl.from_autoencoder import lpl_from_autoencoder
    from lpl_pretrain.losses.lpl.loss import LatentPerceptualLoss, LPLOutput


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
