"""LPL for a training loop outside this package, from a diffusers autoencoder in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lpl_pretrain.config.autoencoder import FAMILIES, AutoencoderInfo
from lpl_pretrain.config.load import validate
from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.config.model_json import ModelJSON
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.losses.lpl.features import DTYPES, DecoderFeatures
from lpl_pretrain.losses.lpl.loss import LatentPerceptualLoss
from lpl_pretrain.models.autoencoder import Autoencoder, LatentScaling, decoder_stages

WHERE = "lpl_from_autoencoder"
NOT_HERE = {
    "gate": "pass `weights` to the loss, 0 for samples that it should not count",
    "noise_weighting": "pass `weights` to the loss",
    "sample_fraction": "pass fewer samples to the loss",
    "weight": "multiply the loss",
    "target_fraction": "multiply the loss",
    "calibration_steps": "multiply the loss",
    "start_step": "call the loss when you want it",
    "ramp_steps": "multiply the loss",
    "decoder": "pass that autoencoder",
    "decoder_precision": "pass decoder_dtype",
}
"""Options of an `lpl:` section that belong to a run, and the caller's way to do the same."""


def lpl_from_autoencoder(
    autoencoder: nn.Module,
    *,
    stages: Sequence[str] | None = None,
    scaling_factor: float | Tensor | None = None,
    shift_factor: float | Tensor | None = None,
    decoder_dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **options: Any,
) -> LatentPerceptualLoss:
    """Latent Perceptual Loss (arXiv 2411.04873) on the decoder of a diffusers autoencoder.

        lpl = lpl_from_autoencoder(AutoencoderKL.from_pretrained(folder))
        z0 = (raw - shift_factor) * scaling_factor     # raw: latents as `encode` gives them
        (mse + w * lpl(z0, z0_hat, gate).loss.mean()).backward()

    Args:
        autoencoder: AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny or AutoencoderDC, on any
            device and in any dtype.  It is copied without its encoder and stays as it is.
        stages: decoder stages to compare, of `mid`, `up0`, `up1` ...; None: all.  The decoder runs
            to the deepest of them, and no further.
        scaling_factor, shift_factor: z0 = (raw - shift_factor) * scaling_factor, a number or one
            for each channel, (C,).  None: the autoencoder's own.
        decoder_dtype: float32, bfloat16 or float64.  Distances are in float32 at least.
        device: of the decoder; None: that of the autoencoder.
        options: `distance`, `normalize`, `outliers`, `depth_weights`, `crop`, `chunk_size`,
            `activation_checkpointing`, `compile` and `preset`, as in docs/lpl.md.

    Returns:
        A module without trainable parameters.  Its call
        `loss(z0, z0_hat, weights, crop_positions=None)` takes z0 and z0_hat (K, C, H, W) float32
        and weights (K,), 0 for samples outside the gate, and returns an `LPLOutput`.  `.loss` (K,)
        is without unit, already times its weight, and carries its gradient to z0_hat.

    Raises:
        ConfigError: unknown autoencoder, stage or option, or a value of the wrong type.
    """
    info = _info(autoencoder)
    if stages is not None and (unknown := [name for name in stages if name not in info.upscales]):
        raise ConfigError(
            f"{WHERE}: stages={list(stages)}: {unknown} are no stages of this "
            f"{info.family}; it has {info.stages}"
        )
    config = _config(options, stages, decoder_dtype)
    network = Autoencoder(_copy_of_decoder(autoencoder), "", info)
    shift = network.shift if shift_factor is None else shift_factor
    scale = network.scale if scaling_factor is None else scaling_factor
    features = DecoderFeatures(
        decoder_stages(network.network),
        LatentScaling(
            _per_channel("shift_factor", shift, info.latent_channels),
            _per_channel("scaling_factor", scale, info.latent_channels),
        ),
        config.stages,
        dtype=decoder_dtype,
    )
    if config.compile:
        features.compile_layers()
    return LatentPerceptualLoss(
        config, features.to(device or next(autoencoder.parameters()).device)
    )


def _info(autoencoder: nn.Module) -> AutoencoderInfo:
    """Family, latents and stages by the autoencoder's `config`.  Raises ConfigError."""
    family = type(autoencoder).__name__
    if family not in FAMILIES:
        raise ConfigError(
            f"{WHERE}: the decoder of a {family} is not known; known are {', '.join(FAMILIES)}"
        )
    settings: Mapping[str, Any] = {**autoencoder.config, "_class_name": family}  # type: ignore[dict-item]
    return FAMILIES[family](ModelJSON(f"{WHERE}: {family}.config", settings))


def _config(
    options: dict[str, Any], stages: Sequence[str] | None, decoder_dtype: torch.dtype
) -> LPLConfig:
    """Raises ConfigError."""
    for name in options:
        if name in NOT_HERE:
            raise ConfigError(f"{WHERE}: {name} is an option of a run; here {NOT_HERE[name]}")
    precisions = {dtype: name for name, dtype in DTYPES.items()}
    if decoder_dtype not in precisions:
        raise ConfigError(
            f"{WHERE}: decoder_dtype={decoder_dtype}: wanted one of "
            f"{', '.join(map(str, precisions))}"
        )
    settings = {
        "weight": 1.0,
        "stages": None if stages is None else list(stages),
        "decoder_precision": precisions[decoder_dtype],
        **options,
    }
    return validate(LPLConfig, settings, where=WHERE)


def _copy_of_decoder(autoencoder: nn.Module) -> nn.Module:
    """A deep copy, in which the encoder is empty."""
    copied = {id(autoencoder.encoder): nn.Identity()}
    return copy.deepcopy(autoencoder, copied)


def _per_channel(name: str, value: float | Tensor, channels: int) -> Tensor:
    """(C,) float32.  Raises ConfigError."""
    tensor = torch.as_tensor(value, dtype=torch.float32).detach().cpu()
    if tensor.shape not in ((), (channels,)):
        raise ConfigError(
            f"{WHERE}: {name} has the shape {tuple(tensor.shape)}, wanted a number or ({channels},)"
        )
    return tensor.expand(channels).clone()
