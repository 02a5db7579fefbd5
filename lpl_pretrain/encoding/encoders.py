"""The frozen networks of an encode, and the storage formats of their outputs.

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
    """The part of models/autoencoder.py that an encode uses."""

    identity: str
    downscale: int
    latent_channels: int
    shift: float
    scale: float

    def to(self, device: torch.device) -> Autoencoder: ...
    def encode_moments(self, images: Tensor) -> Tensor: ...


class TextEncoder(Protocol):
    """The part of models/text.py that an encode uses."""

    identity: str
    width: int
    pooled_width: int | None

    def to(self, device: torch.device) -> TextEncoder: ...
    def encode(self, captions: list[str]) -> list[tuple[Tensor, Tensor | None]]: ...


@dataclass(frozen=True, slots=True)
class StoredMoments:
    """Moments of a batch as they are stored."""

    stored: np.ndarray  # (B, 2C, H, W) float16, or uint16: the bits of bfloat16
    floats: np.ndarray  # float32, the same numbers
    finite: np.ndarray  # (B,) bool
    max_abs: np.ndarray  # (B,) largest absolute value before rounding


@dataclass(frozen=True, slots=True)
class Encoders:
    """The autoencoder and the text encoders of an encode, on one device."""

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
    ) -> Encoders:
        """Loads the networks that are not given."""
        if autoencoder is None:
            # imports diffusers: seconds that a caller with its own autoencoder does not spend
            from lpl_pretrain.models.autoencoder import load_autoencoder

            autoencoder = load_autoencoder(config.autoencoder)
        if text is None and config.text:
            from lpl_pretrain.models.text import load_text_encoder  # imports transformers

            text = {
                name: load_text_encoder(entry, where=f"text.{name}")
                for name, entry in config.text.items()
            }
        storage: dict[str, str] = {name: entry.storage for name, entry in config.text.items()}
        return cls(autoencoder, text or {}, storage, torch.device("cpu"))

    def to(self, device: torch.device) -> Encoders:
        text = {name: encoder.to(device) for name, encoder in self.text.items()}
        return Encoders(self.autoencoder.to(device), text, self.storage, device)

    def identities(self) -> dict[str, str]:
        """Name -> identity of every network."""
        return {
            "autoencoder": self.autoencoder.identity,
            **{f"text.{name}": encoder.identity for name, encoder in self.text.items()},
        }

    @torch.inference_mode()
    def encode_moments(self, pixels: np.ndarray, config: EncodeConfig) -> StoredMoments:
        """Moments of `pixels`, rounded to `config.moments_dtype`."""
        images = torch.tensor(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            moments = self.autoencoder.encode_moments(images).float()
        downscale = self.autoencoder.downscale
        assert moments.shape == (
            len(pixels),
            2 * self.autoencoder.latent_channels,
            images.shape[-2] // downscale,
            images.shape[-1] // downscale,
        ), moments.shape
        rounded = moments.to(torch.float16 if config.moments_dtype == "fp16" else torch.bfloat16)
        return StoredMoments(
            stored=rounded.view(torch.int16).cpu().numpy().view(NUMPY_DTYPES[config.moments_dtype]),
            floats=rounded.float().cpu().numpy(),
            finite=rounded.isfinite().flatten(1).all(dim=1).cpu().numpy(),
            max_abs=moments.abs().flatten(1).amax(dim=1).cpu().numpy(),
        )

    @torch.inference_mode()
    def embed_captions(self, captions: list[str]) -> dict[str, list[CaptionEmbedding]]:
        """Encoder name -> one embedding for each caption."""
        return {
            name: [
                store_embedding(states, pooled, self.storage[name])
                for states, pooled in encoder.encode(captions)
            ]
            for name, encoder in self.text.items()
        }


def store_embedding(states: Tensor, pooled: Tensor | None, storage: str) -> CaptionEmbedding:
    """Rounds an embedding to `storage`; `states` (T, D) has no padding.

    int8: each token is divided by its scale, its largest absolute value / 127.
    """
    tokens = states.float().cpu()
    half_pooled = None if pooled is None else pooled.half().cpu().numpy()
    if storage == "fp16":
        return CaptionEmbedding(tokens.half().numpy(), None, half_pooled)
    scale = (tokens.abs().amax(dim=1) / 127).half().clamp_(min=torch.finfo(torch.float16).tiny)
    values = (tokens / scale.float()[:, None]).round().clamp_(-127, 127).to(torch.int8)
    return CaptionEmbedding(values.numpy(), scale.numpy(), half_pooled)
