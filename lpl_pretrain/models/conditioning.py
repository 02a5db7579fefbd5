"""Conditions of the denoiser: class labels, text states, pooled text and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lpl_pretrain.config.dataset import TextEntry
from lpl_pretrain.config.text_layout import Layout, encoders, groups, text_shape


@dataclass(frozen=True, slots=True)
class Conditioning:
    labels: Tensor  # (B,) int64 class ids; `num_classes` is the null class
    text: Tensor | None = None  # (B, T, J) states of all text encoders
    pooled: Tensor | None = None  # (B, P)
    sizes: Tensor | None = (
        # (B, 6) int64, as data.batch has them: of the source, of the crop's corner, of the picture
        None
    )


def class_conditioning(
    labels: Tensor, num_classes: int, dropped: Tensor | None = None
) -> Conditioning:
    """Class ids to conditions; unlabelled samples (-1) and those where `dropped` (B,) bool is True
    get the null class.
    """
    null = labels < 0 if dropped is None else (labels < 0) | dropped
    return Conditioning(torch.where(null, num_classes, labels))


class TextConditioner:
    """Embeddings by encoder, as stored, to what a model reads: the same shape for every batch, the
    empty caption where dropped.
    """

    def __init__(
        self,
        layout: Layout,
        entries: dict[str, TextEntry],
        empty: dict[str, dict[str, Tensor]],
        online: Callable[[list[str]], Mapping[str, Any]] | None = None,
    ) -> None:
        """`empty`: of the caption "", by encoder: `tokens` (T, D) and, where there is one, `pooled`
        (P,).

        `online`: encoders that run here, and know their own.
        """
        self.layout, self.entries, self.shape, self.online = (
            layout,
            entries,
            text_shape(layout, entries),
            online,
        )
        if online is not None:
            found = online([""]).items()
            own = {
                name: {
                    "tokens": text.states[0],
                    "pooled": None if text.pooled is None else text.pooled[0],
                }
                for name, text in found
            }
            empty = {**empty, **own}
        self.empty = {
            name: (self._padded(found["tokens"][None], name)[0], found.get("pooled"))
            for name, found in empty.items()
        }

    def __call__(
        self, text: Mapping[str, Any], dropped: Tensor, captions: list[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, J) and (B, P) float32; `text`: by encoder, `states` (B, t, D) and `pooled` (B, P),
        as data.batch has them.

        `captions` are for encoders that run here.
        """
        if self.online is not None:
            assert captions is not None
            text = {**text, **self.online(captions)}
        states = {name: self._padded(text[name].states, name) for name in encoders(self.layout)}
        pooled = {name: text[name].pooled for name in states if text[name].pooled is not None}
        return self._joined(
            {name: _where(dropped, self.empty[name][0], tensor) for name, tensor in states.items()},
            {
                name: _where(dropped, self.empty[name][1], tensor.float())
                for name, tensor in pooled.items()
            },
        )

    def null(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings of the null text for `count` samples."""
        states = {name: tokens.expand(count, -1, -1) for name, (tokens, _) in self.empty.items()}
        pooled = {
            name: vector.expand(count, -1)
            for name, (_, vector) in self.empty.items()
            if vector is not None
        }
        joined, together = self._joined(states, pooled)
        return joined.to(device), together.to(device)

    def _joined(
        self, states: dict[str, Tensor], pooled: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        parts = []
        for group in groups(self.layout):
            longest = max(states[name].shape[1] for name in group)
            side_by_side = torch.cat(
                [pad(states[name], (0, 0, 0, longest - states[name].shape[1])) for name in group],
                dim=2,
            )
            parts.append(pad(side_by_side, (0, self.shape.width - side_by_side.shape[2])))
        joined = torch.cat(parts, dim=1)
        vectors = [pooled[name] for name in encoders(self.layout) if name in pooled]
        return joined, torch.cat(vectors, dim=1) if vectors else joined.new_zeros(len(joined), 0)

    def _padded(self, states: Tensor, name: str) -> Tensor:
        """(B, t, D) -> (B, max_tokens, D) float32."""
        return pad(states.float(), (0, 0, 0, self.entries[name].max_tokens - states.shape[1]))


def _where(dropped: Tensor, empty: Tensor | None, given: Tensor) -> Tensor:
    assert empty is not None
    return torch.where(dropped.view(-1, *[1] * (given.ndim - 1)), empty.to(given.device), given)


def known_sizes(sizes: Tensor) -> Tensor:
    """(B, 6) with the picture's own size and corner (0, 0) where nothing was recorded (-1)."""
    own = torch.cat([sizes[:, 4:], torch.zeros_like(sizes[:, 2:4]), sizes[:, 4:]], dim=1)
    return torch.where(sizes < 0, own, sizes)
