"""From a model's section of the configuration and what it will see to the network."""

from __future__ import annotations

import torch

from lpl_pretrain.config.dataset import DatasetIndex, LatentEntry
from lpl_pretrain.config.message import one_line, short
from lpl_pretrain.config.model import DiTConfig, MMDiTConfig, UNetConfig
from lpl_pretrain.config.online_text import text_entries
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.text_layout import TextShape, text_shape
from lpl_pretrain.diffusion.denoiser import Denoiser
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.models.dit import DiT
from lpl_pretrain.models.mmdit import MMDiT

Section = DiTConfig | MMDiTConfig | UNetConfig


def build_denoiser(
    config: Section,
    latent: LatentEntry,
    num_classes: int,
    seed: int = 0,
    *,
    text: TextShape | None = None,
) -> Denoiser:
    """Initial weights depend on `seed` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, MMDiTConfig):
            assert text is not None, "config/check.py asks for text"
            return MMDiT(config, latent.channels, latent.height, latent.width, text)
        if isinstance(config, UNetConfig):
            from lpl_pretrain.models.unet import UNet  # diffusers' costs seconds at start-up

            return UNet(config, latent.channels, latent.height, num_classes, text)
        return DiT(config, latent.channels, latent.height, latent.width, num_classes, text)


def build_on_meta(
    config: Section, index: DatasetIndex, text: TextShape | None = None
) -> tuple[Denoiser, Conditioning]:
    """The denoiser and the conditions of one sample, on meta tensors, which hold no data."""
    with torch.device("meta"):
        model = build_denoiser(config, index.latent, len(index.classes), text=text)
        labels = torch.empty(1, dtype=torch.int64)
        if text is None:
            return model, Conditioning(labels)
        states, pooled = torch.empty(1, text.tokens, text.width), torch.empty(1, text.pooled_width)
        return model, Conditioning(labels, states, pooled, torch.empty(1, 6, dtype=torch.int64))


def check_model_runs(config: TrainConfig, index: DatasetIndex) -> None:
    """Run one forward and loss on meta tensors, for the smallest and the largest bucket.  Raises
    ConfigError.

    It finds what rules in `config` do not, such as blocks of a U-Net that do not fit together.  A
    transformer is checked at a depth of 2: all its blocks but the last are alike.
    """
    layout, conditioning = config.conditioning.text_encoders, config.conditioning
    text = text_shape(layout, text_entries(conditioning, index.text)) if layout else None
    check_denoiser_runs(config.model, index, text)


def check_denoiser_runs(
    config: Section, index: DatasetIndex, text: TextShape | None = None
) -> None:
    """As `check_model_runs`."""
    if not isinstance(config, UNetConfig):
        config = config.model_copy(update={"depth": min(config.depth, 2)})
    what = f"model.settings={short(config.settings)}" if isinstance(config, UNetConfig) else "model"
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
    except (
        Exception
    ) as error:  # whatever torch, timm or diffusers raise for arguments that do not fit
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise ConfigError(
            f"{what}: a {config.kind} of these settings does not run: {reason}; change them"
        ) from None


def _check_loss(model: Denoiser, z_t: torch.Tensor, cond: Conditioning) -> None:
    """`z_t` (1, C, H, W).  The answer has its shape, or twice its channels where the model predicts
    a variance too.
    """
    output = model(z_t, torch.empty(len(z_t), device="meta"), cond).output
    channels = z_t.shape[1] * (2 if getattr(model.config, "learned_sigma", False) else 1)
    wanted = (len(z_t), channels, *z_t.shape[2:])
    if tuple(output.shape) != wanted:
        raise ConfigError(
            f"model: gives {tuple(output.shape)} for latents of {tuple(z_t.shape)}, wanted {wanted}"
        )
    output.float().square().mean()
