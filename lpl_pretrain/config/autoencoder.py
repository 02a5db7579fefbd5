"""Properties of an autoencoder in its config.json, read without torch: family, latents, and decoder
stages.

Stages are named in the order they run: `mid` at the latent's own resolution, then `up0`, `up1`, ...
(models/autoencoder_specs.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lpl_pretrain.config.message import one_line, short
from lpl_pretrain.config.model_json import ModelJSON, read_model_json
from lpl_pretrain.errors import ConfigError

UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


@dataclass(frozen=True, slots=True)
class AutoencoderInfo:
    family: str  # diffusers class
    latent_channels: int
    downscale: int  # pixels per latent position along one side
    upscales: dict[
        str, int
    ]  # stage -> side of its output / side of the latent, in the order in which they run
    shift: float
    scale: float | None  # z0 = (raw latent - shift) * scale; None: not in config.json

    @property
    def stages(self) -> list[str]:
        return list(self.upscales)


def read_autoencoder(folder: str, path: Path) -> AutoencoderInfo:
    """`folder` is what the user wrote, `path` where it lies.  Raises ConfigError for a family that
    is not known.
    """
    where, config = f"autoencoder={folder}", path / "config.json"
    if not os.path.isfile(config):
        raise ConfigError(
            f"{where}: {config} not found; wanted a folder as diffusers' save_pretrained writes it"
        )
    settings = read_model_json(where, config)
    if not settings.one_of("_class_name", list(FAMILIES)):
        raise ConfigError(
            f"{where}: its decoder is a {short(settings.get('_class_name'))}, which is not known; "
            f"known are {', '.join(FAMILIES)} (add a family in config/autoencoder.py and "
            "models/autoencoder_specs.py)"
        )
    return FAMILIES[settings.text("_class_name")](settings)


def _kl(settings: ModelJSON) -> AutoencoderInfo:
    """SD, SDXL, SD3, FLUX and FLUX.2: `mid_block`, then `up_blocks`, all but the last of which
    double the side.
    """
    blocks = settings.listed("up_block_types", str)
    if unknown := sorted(set(blocks) - set(UP_BLOCKS)):
        listed = one_line(", ".join(unknown), 200)
        raise ConfigError(
            f"{settings.where}: has up blocks of type {listed}; known are {', '.join(UP_BLOCKS)}"
        )
    last = len(blocks) - 1
    return AutoencoderInfo(
        settings.text("_class_name"),
        settings.count("latent_channels"),
        2 ** (len(settings.listed("block_out_channels", int)) - 1),
        {"mid": 1, **{f"up{i}": 2 ** min(i + 1, last) for i in range(last + 1)}},
        float(settings.number("shift_factor") or 0.0),
        _scaling_factor(settings),
    )


def _tiny(settings: ModelJSON) -> AutoencoderInfo:
    """TAESD and its relatives: blocks at the latent's resolution, then (upsample, convolution,
    blocks) again and again.
    """
    factor = settings.count("upsampling_scaling_factor", most=16)
    stages = len(settings.listed("num_decoder_blocks", int))
    return AutoencoderInfo(
        settings.text("_class_name"),
        settings.count("latent_channels"),
        factor ** (stages - 1),
        {"mid": 1, **{f"up{i}": factor ** (i + 1) for i in range(stages - 1)}},
        float(settings.number("shift_factor") or 0.0),
        _scaling_factor(settings),
    )


def _dc(settings: ModelJSON) -> AutoencoderInfo:
    """SANA: the deepest block keeps the resolution, each of the others doubles it; one without
    layers is part of the exit.
    """
    stages = sum(count > 0 for count in settings.listed("decoder_layers_per_block", int))
    return AutoencoderInfo(
        settings.text("_class_name"),
        settings.count("latent_channels"),
        2 ** (len(settings.listed("encoder_block_out_channels", (int, list))) - 1),
        {"mid": 1, **{f"up{i}": 2 ** (i + 1) for i in range(stages - 1)}},
        0.0,
        _scaling_factor(settings),
    )


def _scaling_factor(settings: ModelJSON) -> float | None:
    """None: not in config.json."""
    factor = settings.number("scaling_factor")
    if factor is not None and factor <= 0:
        raise settings.wrong("scaling_factor", "a number greater than 0")
    return factor


FAMILIES: dict[str, Callable[[ModelJSON], AutoencoderInfo]] = {
    "AutoencoderKL": _kl,
    "AutoencoderKLFlux2": _kl,
    "AutoencoderTiny": _tiny,
    "AutoencoderDC": _dc,
}
