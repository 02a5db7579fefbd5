"""What an autoencoder's config.json says, read without torch: its family, its latents, and the stages of its decoder.

Stages are named in the order they run: `mid` at the latent's own resolution, then `up0`, `up1`, ... (models/decoder.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl_pretrain.errors import ConfigError

UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


@dataclass(frozen=True, slots=True)
class AutoencoderFacts:
    family: str  # diffusers class
    latent_channels: int
    downscale: int  # pixels per latent position along one side
    upscales: dict[str, int]  # stage -> side of its output / side of the latent, in the order in which they run
    shift: float
    scale: float | None  # z0 = (raw latent - shift) * scale; None: not in config.json

    @property
    def stages(self) -> list[str]:
        return list(self.upscales)


def read_autoencoder(folder: str, path: Path) -> AutoencoderFacts:
    """`folder` is what the user wrote, `path` where it lies.  Raises ConfigError for a family that is not known."""
    config = path / "config.json"
    if not config.is_file():
        raise ConfigError(f"autoencoder={folder}: {config} not found; wanted a folder as diffusers' save_pretrained writes it")
    try:
        settings = json.loads(config.read_text())
    except json.JSONDecodeError as problem:
        raise ConfigError(f"autoencoder={folder}: {config} is not valid JSON: {problem}") from None
    family = settings.get("_class_name")
    if family not in FAMILIES:
        raise ConfigError(
            f"autoencoder={folder}: its decoder is a {family!r}, which is not known; known are {', '.join(FAMILIES)} "
            "(a family is added in config/autoencoder.py and models/decoder.py)"
        )
    try:
        return FAMILIES[family](settings)
    except ValueError as problem:
        raise ConfigError(f"autoencoder={folder}: {problem}") from None
    except KeyError as missing:
        raise ConfigError(f"autoencoder={folder}: {config} has no {missing}, as every {family} has: save it again") from None


def _kl(settings: dict[str, Any]) -> AutoencoderFacts:
    """SD, SDXL, SD3, FLUX and FLUX.2: `mid_block`, then `up_blocks`, all but the last of which double the side."""
    unknown = sorted(set(settings["up_block_types"]) - set(UP_BLOCKS))
    if unknown:
        raise ValueError(f"its decoder has up blocks of type {', '.join(unknown)}; known are {', '.join(UP_BLOCKS)}")
    last = len(settings["up_block_types"]) - 1
    ups = {f"up{i}": 2 ** min(i + 1, last) for i in range(last + 1)}
    return AutoencoderFacts(
        settings["_class_name"],
        settings["latent_channels"],
        2 ** (len(settings["block_out_channels"]) - 1),
        {"mid": 1, **ups},
        float(settings.get("shift_factor") or 0.0),
        settings.get("scaling_factor"),
    )


def _tiny(settings: dict[str, Any]) -> AutoencoderFacts:
    """TAESD and its relatives: blocks at the latent's resolution, then (upsample, convolution, blocks) again and again."""
    factor, stages = settings["upsampling_scaling_factor"], len(settings["num_decoder_blocks"])
    return AutoencoderFacts(
        settings["_class_name"],
        settings["latent_channels"],
        factor ** (stages - 1),
        {"mid": 1, **{f"up{i}": factor ** (i + 1) for i in range(stages - 1)}},
        float(settings.get("shift_factor") or 0.0),
        settings.get("scaling_factor"),
    )


def _dc(settings: dict[str, Any]) -> AutoencoderFacts:
    """SANA: the deepest block keeps the resolution, each of the others doubles it; one without layers is part of the exit."""
    layers = settings["decoder_layers_per_block"]
    stages = sum(count > 0 for count in layers)
    return AutoencoderFacts(
        settings["_class_name"],
        settings["latent_channels"],
        2 ** (len(settings["encoder_block_out_channels"]) - 1),
        {"mid": 1, **{f"up{i}": 2 ** (i + 1) for i in range(stages - 1)}},
        0.0,
        settings.get("scaling_factor"),
    )


FAMILIES: dict[str, Callable[[dict[str, Any]], AutoencoderFacts]] = {
    "AutoencoderKL": _kl,
    "AutoencoderKLFlux2": _kl,
    "AutoencoderTiny": _tiny,
    "AutoencoderDC": _dc,
}
