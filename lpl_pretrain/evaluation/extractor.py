"""The contract of a feature extractor: a frozen network, its weights, its preprocessing, its name.

Pixels go in as uint8 (N, 3, H_px, W_px); features come out as float32: `pooled` (N, D), of
Inception `spatial` and `logits` too.  A score carries its extractor's name; only scores by the
published Inception weights have none (`fid`, `kid`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lpl_pretrain.config.extractors import ExtractorInfo
from lpl_pretrain.config.protocol import ExtractorConfig

CPU_CHUNK = 4
"""Images at a time on a CPU, so that activations stay in its cache: EfficientNet-Lite0 reaches
35 images/s at 4 and 23 at 32 on one core.
"""
MAX_ERROR_LENGTH = 300
"""Characters of a library's error that our own message repeats."""

Features = dict[str, Tensor]


@dataclass(frozen=True)
class Extractor:
    """A loaded feature extractor."""

    config: ExtractorConfig
    suffix: str
    """End of the names of its scores; "" for the published FID Inception."""
    dimension: int
    """Width D of `pooled`."""
    weights_sha256: str
    preprocessing: str
    """Description for the record: only features of the same preprocessing are comparable."""
    network: nn.Module
    extract: Callable[[nn.Module, Tensor], Features]
    """(network, uint8 pixels on its device) -> features."""
    embed_text: Callable[[list[str]], Tensor] | None = None
    """Captions to embeddings (N, D), for a network that reads text."""

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        """Extract float32 features by name, on the network's device, from uint8 (N, 3, H, W)."""
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] != 3:
            raise TypeError(
                f"wanted uint8 pixels (N, 3, H, W), found {pixels.dtype} {tuple(pixels.shape)}"
            )
        pixels = pixels.to(self.device)
        chunks = pixels.split(CPU_CHUNK) if pixels.device.type == "cpu" else [pixels]
        outputs = [self.extract(self.network, chunk) for chunk in chunks]
        return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def identity(self) -> dict[str, str | int]:
        """Entry in records; only scores by extractors of equal identities are comparable."""
        return {
            "name": self.config.label,
            "weights_sha256": self.weights_sha256,
            "preprocessing": self.preprocessing,
            "dimension": self.dimension,
        }


@dataclass(frozen=True, slots=True)
class ExtractorSpec:
    """A kind of extractor: its description (config/extractors.py) and its loader."""

    info: ExtractorInfo
    load: Callable[[ExtractorConfig, torch.device], Extractor]
    """Raises ConfigError for weights that do not fit."""


def resize_bicubic(pixels: Tensor, side: int) -> Tensor:
    """Resize uint8 (N, 3, H, W) to float32 (N, 3, side, side) in 0 ... 255.

    Pillow's antialiased bicubic, unrounded, as in clean-fid (arXiv 2104.11222).
    """
    return interpolate(
        pixels.float(), size=(side, side), mode="bicubic", antialias=True, align_corners=False
    )
