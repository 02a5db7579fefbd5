"""What a text-conditioned model is told for picture i: a training sample's caption, a function of
(seed, i) alone, or a prompt.
"""

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
    """Captions of one's own: picture i gets the one at i, from the start again behind the last."""

    texts: tuple[str, ...]
    folders: dict[str, str]
    """Text encoders of a run that was trained on stored embeddings, by name."""


class Captions:
    def __init__(
        self, config: TrainConfig, device: torch.device, prompts: Prompts | None = None
    ) -> None:
        """Of `config.data.folder`, by the encoders of `config.conditioning`.  Raises ConfigError."""
        self.prompts, conditioning = prompts, config.conditioning
        self._stream = LatentStream(
            config.data,
            config.seed,
            1,
            RequestedFields(captions=True, text=stored_encoders(conditioning)),
        )
        folders, index = self._stream.folders, self._stream.index
        entries = text_entries(conditioning, index.text)
        empty = read_null_text(folders.paths[0], folders.indexes[0], stored_encoders(conditioning))
        here = dict(conditioning.online_encoders)
        if prompts is not None:
            here |= _encoders_of(index, conditioning, prompts.folders)
        online = None
        if here:
            from lpl_pretrain.models.text import OnlineText  # imports transformers

            online = OnlineText.load(here, device)
        self.conditioner = TextConditioner(conditioning.text_encoders, entries, empty, online)
        side = [
            count * index.autoencoder.downscale
            for count in (index.latent.height, index.latent.width)
        ]
        self.sizes = torch.tensor([[*side, 0, 0, *side]])
        """(1, 6): pictures drawn are whole and of the size that they ask for."""

    def draw(self, seed: int, indices: Sequence[int]) -> tuple[list[str], Tensor, Tensor]:
        """Captions, and their (N, T, J) and (N, P) embeddings."""
        if self.prompts is not None:
            captions = [self.prompts.texts[i % len(self.prompts.texts)] for i in indices]
            return captions, *self.conditioner(
                {}, torch.zeros(len(captions), dtype=torch.bool), captions
            )
        samples = self._stream.index.samples
        numbers = (
            (rng.uniform(seed, "sample_caption", indices) * samples)
            .long()
            .clamp(max=samples - 1)
            .tolist()
        )
        captions, states, pooled = [], [], []
        for number in numbers:  # one at a time: neighbours may be of different buckets
            batch = self._stream.read([number])
            text, vector = self.conditioner(batch.text, torch.tensor([False]), batch.captions)
            captions += batch.captions or [""]
            states.append(text.cpu())
            pooled.append(vector.cpu())
        return captions, torch.cat(states), torch.cat(pooled)


def _encoders_of(
    index: DatasetIndex, conditioning: ConditioningConfig, folders: dict[str, str]
) -> dict[str, TextEncoderConfig]:
    """The encoders that made a folder's embeddings, found again in `folders`.  Raises ConfigError."""
    found = {}
    for name in stored_encoders(conditioning):
        if name not in folders:
            raise ConfigError(
                f"--prompt: the run reads embeddings by {name!r}: name its encoder, --text-encoder "
                f"{name}=FOLDER"
            )
        settings = json.loads(index.config)["text"][name]
        found[name] = TextEncoderConfig.model_validate({**settings, "folder": folders[name]})
        if (here := text_entry(found[name], f"--text-encoder {name}").identity) != (
            stored := index.text[name].identity
        ):
            raise ConfigError(
                f"--text-encoder {name}={folders[name]}: is {here[:12]}, the data's embeddings are "
                f"by {stored[:12]}: name that one"
            )
    return found
