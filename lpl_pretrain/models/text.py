"""Frozen text encoders of transformers (CLIP, T5, BERT and related): captions to token states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lpl_pretrain.config.encode import TextEncoderConfig
from lpl_pretrain.config.hashing import text_encoder_identity
from lpl_pretrain.config.load import resolve_path
from lpl_pretrain.errors import ConfigError

ENCODER_HALVES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
"""Model type -> class of the encoder, for types whose text encoder is half of a larger network."""


class TextEncoder(nn.Module):
    """Frozen, in eval mode, float32 unless moved."""

    def __init__(
        self, network: Any, tokenizer: Any, identity: str, config: TextEncoderConfig
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.identity = identity
        self.config = config
        settings = getattr(network.config, "text_config", None) or network.config
        self.width = settings.hidden_size
        self.pooled_width = None
        if config.pooled:
            _, pooled = self.encode([""])[0]
            if pooled is None:
                raise ConfigError(
                    f"{config.folder}: {type(network).__name__} has no pooled output: set "
                    "pooled=false"
                )
            self.pooled_width = len(pooled)

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> list[tuple[Tensor, Tensor | None]]:
        """States (T, width) of each caption's T tokens, and its pooled vector (P,) if configured.

        Special tokens are included, padding is not.
        """
        tokens = self.tokenizer(
            captions,
            padding=True,
            truncation=True,
            max_length=self.config.max_tokens,
            padding_side="right",
            return_tensors="pt",
        ).to(next(self.network.parameters()).device)
        mask = tokens["attention_mask"]
        out = self.network(
            input_ids=tokens["input_ids"], attention_mask=mask, output_hidden_states=True
        )
        states = (
            out.last_hidden_state
            if self.config.layer == -1
            else out.hidden_states[self.config.layer]
        )
        pooled = out.get("text_embeds", out.get("pooler_output")) if self.config.pooled else None
        lengths = mask.sum(dim=1).tolist()
        return [
            (states[i, :length], None if pooled is None else pooled[i])
            for i, length in enumerate(lengths)
        ]


@dataclass(frozen=True, slots=True)
class TextEmbeddings:
    """Output of one text encoder for a batch of captions, in fp16 as `encode` stores it."""

    states: Tensor  # (B, T, D) float16, zero after each caption's end
    pooled: Tensor | None  # (B, P) float16


class OnlineText:
    """Text encoders that run beside the model during training."""

    def __init__(self, encoders: dict[str, TextEncoder]) -> None:
        self.encoders = encoders

    @classmethod
    def load(cls, settings: dict[str, TextEncoderConfig], device: torch.device) -> OnlineText:
        """Raises ConfigError."""
        found = {
            name: load_text_encoder(config, f"conditioning.online_encoders.{name}")
            for name, config in settings.items()
        }
        return cls({name: encoder.to(device) for name, encoder in found.items()})

    def __call__(self, captions: list[str]) -> dict[str, TextEmbeddings]:
        return {name: _batched(encoder.encode(captions)) for name, encoder in self.encoders.items()}


def _batched(found: list[tuple[Tensor, Tensor | None]]) -> TextEmbeddings:
    states = pad_sequence([tokens.half() for tokens, _ in found], batch_first=True)
    pooled = [vector.half() for _, vector in found if vector is not None]
    return TextEmbeddings(states, torch.stack(pooled) if pooled else None)


def load_text_encoder(config: TextEncoderConfig, where: str) -> TextEncoder:
    """Load an encoder; `where` is its section's path, for errors.  Raises ConfigError."""
    folder = resolve_path(config.folder)
    identity = text_encoder_identity(folder, where)
    try:
        settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network = getattr(transformers, _class_name(settings)).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"{where}.folder={config.folder}: transformers cannot load it: {error}"
        ) from None
    layers = getattr(getattr(settings, "text_config", settings), "num_hidden_layers", None)
    if layers is not None and not -layers - 1 <= config.layer <= layers:
        raise ConfigError(
            f"{where}.layer={config.layer}: the encoder has {layers} layers: use {-layers - 1} "
            f"to {layers}"
        )
    return TextEncoder(network, tokenizer, identity, config)


def _class_name(settings: Any) -> str:
    if settings.model_type in ENCODER_HALVES:
        return ENCODER_HALVES[settings.model_type]
    if settings.model_type in ("clip", "clip_text_model"):
        projected = (
            "CLIPTextModelWithProjection" in (settings.architectures or [])
            or settings.model_type == "clip"
        )
        return "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return "AutoModel"
