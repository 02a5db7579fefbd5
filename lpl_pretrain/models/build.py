"""Build the network of a model section of the configuration, and check that it runs."""

from __future__ import annotations

import torch

from lpl_pretrain.config.dataset import DatasetIndex, LatentEntry
from lpl_pretrain.config.message import one_line, short
from lpl_pretrain.config.model import ModelConfig
from lpl_pretrain.config.online_text import run_text_shape
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.diffusion.denoiser import Denoiser
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.models.registry import MODELS


def build_denoiser(
    config: ModelConfig,
    latent: LatentEntry,
    num_classes: int,
    seed: int = 0,
    *,
    text: TextShape | None = None,
) -> Denoiser:
    """Build the network of a model section.

    Initial weights depend on `seed` alone; the global random state is left as it was.
    """
    spec = MODELS[config.kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = spec.build(config, latent, num_classes, text)
    model.float8_skip = spec.float8_skip
    return model


def build_run_denoiser(config: TrainConfig, index: DatasetIndex, seed: int = 0) -> Denoiser:
    """Build the network of a run on the data of `index`.  Raises ConfigError."""
    text = run_text_shape(config, index)
    return build_denoiser(config.model, index.latent, len(index.classes), seed, text=text)


def build_on_meta(
    config: ModelConfig, index: DatasetIndex, text: TextShape | None = None
) -> tuple[Denoiser, Conditioning]:
    """Build the denoiser and the conditions of one sample on meta tensors, which hold no data."""
    with torch.device("meta"):
        model = build_denoiser(config, index.latent, len(index.classes), text=text)
        labels = torch.empty(1, dtype=torch.int64)
        if text is None:
            return model, Conditioning(labels)
        states = torch.empty(1, text.tokens, text.width)
        pooled = torch.empty(1, text.pooled_width)
        return model, Conditioning(labels, states, pooled, torch.empty(1, 6, dtype=torch.int64))


def check_model_runs(config: TrainConfig, index: DatasetIndex) -> None:
    """Run one forward and loss on meta tensors, for the smallest and the largest bucket.

    This finds problems that the rules in config/ do not, such as blocks of a U-Net that do not fit
    together.  A model with a `depth` is checked at 2: all its blocks but the last are alike.
    Raises ConfigError.
    """
    check_denoiser_runs(config.model, index, run_text_shape(config, index))


def check_denoiser_runs(
    config: ModelConfig, index: DatasetIndex, text: TextShape | None = None
) -> None:
    """Do what `check_model_runs` does for a model section alone."""
    depth = getattr(config, "depth", None)
    if depth is not None:
        config = config.model_copy(update={"depth": min(depth, 2)})
    settings = getattr(config, "settings", None)
    key = "model" if settings is None else f"model.settings={short(settings)}"
    shapes = sorted(
        {(bucket.height, bucket.width) for bucket in index.buckets},
        key=lambda side: side[0] * side[1],
    )
    try:
        model, cond = build_on_meta(config, index, text)
        for name in model.sharded_blocks():
            model.get_submodule(name)
        for height, width in dict.fromkeys([shapes[0], shapes[-1]]):
            z_t = torch.empty(1, index.latent.channels, height, width, device="meta")
            _check_loss(model, z_t, cond)
    except ConfigError:
        raise
    # torch, timm and diffusers raise errors of many types for arguments that do not fit
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise ConfigError(
            f"{key}: a {config.kind} of these settings does not run: {reason}; change them"
        ) from None


def _check_loss(model: Denoiser, z_t: torch.Tensor, cond: Conditioning) -> None:
    """Check the output's shape for `z_t` (1, C, H, W), and that a loss of it can be computed.

    The output has the shape of `z_t`, with twice its channels if the model predicts a variance too.
    """
    output = model(z_t, torch.empty(len(z_t), device="meta"), cond).output
    channels = z_t.shape[1] * (2 if getattr(model.config, "learned_sigma", False) else 1)
    wanted = (len(z_t), channels, *z_t.shape[2:])
    if tuple(output.shape) != wanted:
        raise ConfigError(
            f"model: gives {tuple(output.shape)} for latents of {tuple(z_t.shape)}, wanted {wanted}"
        )
    output.float().square().mean()
