"""The frozen networks of an encode, and how their answers are stored.

Pixels are uint8 (B, H_px, W_px, 3); images float (B, 3, H_px, W_px) in [-1, 1]; moments (B, 2C, H,
W).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.data.format import NUMPY_DTYPES, CaptionEmbedding


class Autoencoder(Protocol):
    """What is asked of models/autoencoder.py here."""

    identity: str
    downscale: int
    latent_channels: int
    shift: float
    scale: float

    def to(self, device: torch.device) -> Autoencoder: ...
    def encode_moments(self, images: Tensor) -> Tensor: ...


class TextEncoder(Protocol):
    """What is asked of models/text.py here."""

    identity: str
    width: int
    pooled_width: int | None

    def to(self, device: torch.device) -> TextEncoder: ...
    def encode(self, captions: list[str]) -> list[tuple[Tensor, Tensor | None]]: ...


@dataclass(frozen=True, slots=True)
class StoredMoments:
    stored: np.ndarray  # (B, 2C, H, W) float16, or uint16: the bits of bfloat16
    floats: np.ndarray  # float32, the same numbers
    finite: np.ndarray  # (B,) bool
    reach: np.ndarray  # (B,) largest absolute value before rounding


@dataclass(frozen=True, slots=True)
class Networks:
    autoencoder: Autoencoder
    text: dict[str, TextEncoder]
    storage: dict[str, str]  # of each text encoder: int8 or fp16
    device: torch.device

    @classmethod
    def load(
        cls,
        config: EncodeConfig,
        autoencoder: Autoencoder | None,
        text: dict[str, TextEncoder] | None,
    ) -> Networks:
        """Those that are given are taken as they are."""
        if autoencoder is None:
            from lpl_pretrain.models.autoencoder import (
                load_autoencoder,
            )  # imports diffusers: seconds that a given one need not pay

            autoencoder = load_autoencoder(config.autoencoder)
        if text is None and config.text:
            from lpl_pretrain.models.text import load_text_encoder  # imports transformers

            text = {
                name: load_text_encoder(entry, where=f"text.{name}")
                for name, entry in config.text.items()
            }
        storage: dict[str, str] = {name: entry.storage for name, entry in config.text.items()}
        return cls(autoencoder, text or {}, storage, torch.device("cpu"))

    def to(self, device: torch.device) -> Networks:
        text = {name: encoder.to(device) for name, encoder in self.text.items()}
        return Networks(self.autoencoder.to(device), text, self.storage, device)

    def identities(self) -> dict[str, str]:
        return {
            "autoencoder": self.autoencoder.identity,
            **{f"text.{name}": encoder.identity for name, encoder in self.text.items()},
        }

    @torch.inference_mode()
    def moments(self, pixels: np.ndarray, config: EncodeConfig) -> StoredMoments:
        images = torch.tensor(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            moments = self.autoencoder.encode_moments(images).float()
        height, width = (side // self.autoencoder.downscale for side in images.shape[-2:])
        assert moments.shape == (
            len(pixels),
            2 * self.autoencoder.latent_channels,
            height,
            width,
        ), moments.shape
        rounded = moments.to(torch.float16 if config.moments_dtype == "fp16" else torch.bfloat16)
        return StoredMoments(
            rounded.view(torch.int16).cpu().numpy().view(NUMPY_DTYPES[config.moments_dtype]),
            rounded.float().cpu().numpy(),
            rounded.isfinite().flatten(1).all(dim=1).cpu().numpy(),
            moments.abs().flatten(1).amax(dim=1).cpu().numpy(),
        )

    @torch.inference_mode()
    def texts(self, captions: list[str]) -> dict[str, list[CaptionEmbedding]]:
        """By encoder, one for each caption."""
        return {
            name: [
                stored_text(states, pooled, self.storage[name])
                for states, pooled in encoder.encode(captions)
            ]
            for name, encoder in self.text.items()
        }


def stored_text(states: Tensor, pooled: Tensor | None, storage: str) -> CaptionEmbedding:
    """`states` (T, D) of the true tokens.  int8: each token is divided by its largest absolute
    value / 127.
    """
    tokens, vector = states.float().cpu(), None if pooled is None else pooled.half().cpu().numpy()
    if storage == "fp16":
        return CaptionEmbedding(tokens.half().numpy(), None, vector)
    scale = (tokens.abs().amax(dim=1) / 127).half().clamp_(min=torch.finfo(torch.float16).tiny)
    values = (tokens / scale.float()[:, None]).round().clamp_(-127, 127).to(torch.int8)
    return CaptionEmbedding(values.numpy(), scale.numpy(), vector)
