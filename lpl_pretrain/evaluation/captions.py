"""Captions of a text-conditioned model's images: training captions, drawn by (seed, i); prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.encode import TextEncoderConfig
from lpl_pretrain.config.online_text import stored_encoders, text_entries, text_entry
from lpl_pretrain.config.schema import ConditioningConfig, TrainConfig
from lpl_pretrain.data.null_text import read_null_text
from lpl_pretrain.data.stream import LatentStream, RequestedFields
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.models.conditioning import TextConditioner
from lpl_pretrain.runtime import rng


@dataclass(frozen=True, slots=True)
class Prompts:
    """The user's own captions: image i gets number i modulo their number."""

    texts: tuple[str, ...]
    folders: dict[str, str]
    """Folders of text encoders, by name, for a run that was trained on stored embeddings."""


class Captions:
    """Captions and their embeddings, by image index."""

    def __init__(
        self, config: TrainConfig, device: torch.device, prompts: Prompts | None = None
    ) -> None:
        """Read captions of `config.data.folder`, for the encoders of `config.conditioning`.

        Raises ConfigError.
        """
        self.prompts = prompts
        conditioning = config.conditioning
        self._stream = LatentStream(
            config.data,
            config.seed,
            1,
            RequestedFields(captions=True, text=stored_encoders(conditioning)),
        )
        folders = self._stream.folders
        index = self._stream.index
        entries = text_entries(conditioning, index.text)
        empty = read_null_text(folders.paths[0], folders.indexes[0], stored_encoders(conditioning))
        to_load = dict(conditioning.online_encoders)
        if prompts is not None:
            to_load |= _encoders_of(index, conditioning, prompts.folders)
        online = None
        if to_load:
            from lpl_pretrain.models.text import OnlineText  # imports transformers

            online = OnlineText.load(to_load, device)
        self.conditioner = TextConditioner(conditioning.text_encoders, entries, empty, online)
        side = [
            count * index.autoencoder.downscale
            for count in (index.latent.height, index.latent.width)
        ]
        self.sizes = torch.tensor([[*side, 0, 0, *side]])
        """(1, 6) size conditioning of SDXL: original size, crop offset 0, target size; pixels."""

    def draw(self, seed: int, indices: Sequence[int]) -> tuple[list[str], Tensor, Tensor]:
        """Captions of images `indices`, and their embeddings (N, T, J) and pooled (N, P)."""
        if self.prompts is not None:
            captions = [self.prompts.texts[i % len(self.prompts.texts)] for i in indices]
            return captions, *self.conditioner(
                {}, torch.zeros(len(captions), dtype=torch.bool), captions
            )
        samples = self._stream.index.samples
        caption_indices = (
            (rng.uniform(seed, "sample_caption", indices) * samples)
            .long()
            .clamp(max=samples - 1)
            .tolist()
        )
        captions = []
        states = []
        pooled = []
        for index in caption_indices:  # one at a time: neighbours may be of different buckets
            batch = self._stream.read([index])
            text, vector = self.conditioner(batch.text, torch.tensor([False]), batch.captions)
            captions += batch.captions or [""]
            states.append(text.cpu())
            pooled.append(vector.cpu())
        return captions, torch.cat(states), torch.cat(pooled)


def _encoders_of(
    index: DatasetIndex, conditioning: ConditioningConfig, folders: dict[str, str]
) -> dict[str, TextEncoderConfig]:
    """Settings of the encoders of a data folder's embeddings, with these `folders` of weights.

    Raises ConfigError where a folder is absent, or is another encoder.
    """
    encoders = {}
    for name in stored_encoders(conditioning):
        if name not in folders:
            raise ConfigError(
                f"--prompt: the run reads embeddings by {name!r}: name the encoder's folder, "
                f"--text-encoder {name}=FOLDER"
            )
        settings = json.loads(index.config)["text"][name]
        encoder = TextEncoderConfig.model_validate({**settings, "folder": folders[name]})
        identity = text_entry(encoder, f"--text-encoder {name}").identity
        stored = index.text[name].identity
        if identity != stored:
            raise ConfigError(
                f"--text-encoder {name}={folders[name]}: is {identity[:12]}, the data's embeddings "
                f"are by {stored[:12]}: name the folder of that encoder"
            )
        encoders[name] = encoder
    return encoders
