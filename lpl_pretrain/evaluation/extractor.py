"""A feature extractor: a frozen network, its weights, its preprocessing, and its name in scores.

Pixels go in as uint8 (N, 3, H_px, W_px); features come out as float32: `pooled` (N, D), of
Inception `spatial` and `logits` too.  A score carries its extractor's name: `fid` and `kid` without
a suffix are computed with the published Inception weights only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lpl_pretrain.config.protocol import ExtractorConfig

CPU_CHUNK = 4
"""Images at a time on a CPU, so that activations stay in its cache: EfficientNet-Lite0 reaches
35 images/s at 4 and 23 at 32 on one core.
"""
Features = dict[str, Tensor]


@dataclass(frozen=True)
class Extractor:
    config: ExtractorConfig
    suffix: str
    """Of the names of its scores; "" for the published Inception."""
    dimension: int
    """Of `pooled`."""
    weights_sha256: str
    preprocessing: str
    """In words, for the record: features are comparable only when it is the same."""
    network: nn.Module
    extract: Callable[[nn.Module, Tensor], Features]
    embed_text: Callable[[list[str]], Tensor] | None = None
    """Captions to (N, D), of a network that reads them."""

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        """uint8 (N, 3, H_px, W_px) on any device -> float32 features by name, on the network's."""
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] != 3:
            raise TypeError(
                f"wanted uint8 pixels (N, 3, H, W), found {pixels.dtype} {tuple(pixels.shape)}"
            )
        there = pixels.to(self.device)
        chunks = there.split(CPU_CHUNK) if there.device.type == "cpu" else [there]
        found = [self.extract(self.network, chunk) for chunk in chunks]
        return {name: torch.cat([features[name] for features in found]) for name in found[0]}

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def named(self, metric: str) -> str:
        """How a score is called: fid, sfid and kid of the published Inception, `metric` and the
        extractor's label otherwise.
        """
        published = {"fd": "fid", "fd_infinity": "fid_infinity", "spatial_fd": "sfid"}
        return f"{metric}{self.suffix}" if self.suffix else published.get(metric, metric)

    def identity(self) -> dict[str, str | int]:
        return {
            "name": self.config.label,
            "weights_sha256": self.weights_sha256,
            "preprocessing": self.preprocessing,
            "dimension": self.dimension,
        }


def resized(pixels: Tensor, side: int) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 (N, 3, side, side) in 0 ... 255: Pillow's antialiased bicubic,
    unrounded, as in clean-fid.
    """
    return interpolate(
        pixels.float(), size=(side, side), mode="bicubic", antialias=True, align_corners=False
    )


def sha256_of(path: str | Path) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
