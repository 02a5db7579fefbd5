"""What a text-conditioned model is told for picture i: the caption of a training sample, a function of (seed, i) alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.text import encoders
from lpl_pretrain.data.empty import read_empty_captions
from lpl_pretrain.data.stream import LatentStream, Wants
from lpl_pretrain.models.conditioning import TextConditioner
from lpl_pretrain.runtime import rng


class Captions:
    def __init__(self, config: TrainConfig) -> None:
        """Of `config.data.folder`, by the encoders of `config.conditioning.text`."""
        names = encoders(config.conditioning.text)
        self._stream = LatentStream(config.data, config.seed, 1, Wants(captions=True, text=names))
        folders = self._stream.folders
        empty = read_empty_captions(folders.paths[0], names)
        self.conditioner = TextConditioner(config.conditioning.text, folders.merged.text, empty)

        index = self._stream.index
        side = [count * index.autoencoder.downscale for count in (index.latent.height, index.latent.width)]
        self.sizes = torch.tensor([[*side, 0, 0, *side]])
        """(1, 6): pictures drawn are whole and of the size that they ask for."""

    def draw(self, seed: int, indices: Sequence[int]) -> tuple[list[str], Tensor, Tensor]:
        """Captions, and their (N, T, J) and (N, P) embeddings."""
        samples = self._stream.index.samples
        numbers = (rng.uniform(seed, "sample_caption", indices) * samples).long().clamp(max=samples - 1).tolist()
        captions, states, pooled = [], [], []
        for number in numbers:  # one at a time: neighbours may be of different buckets
            batch = self._stream.read([number])
            text, vector = self.conditioner(batch.text, torch.tensor([False]))
            captions += batch.captions or [""]
            states.append(text)
            pooled.append(vector)
        return captions, torch.cat(states), torch.cat(pooled)
