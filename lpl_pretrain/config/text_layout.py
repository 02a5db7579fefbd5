"""Sizes of the sequence and of the pooled vector that the embeddings of several text encoders are
concatenated to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

from lpl_pretrain.config.dataset import TextEntry

Layout = tuple[Union[str, tuple[str, ...]], ...]
"""Encoders concatenated along the sequence; those of a group along the channels, as SD3 does with
its CLIPs.
"""


@dataclass(frozen=True)
class TextShape:
    """Sizes of a caption's embeddings as the model reads them."""

    tokens: int
    """Length of the sequence."""
    width: int
    """Channels of the widest group; the others are padded with zeros."""
    pooled_width: int
    """Channels of the concatenated pooled vectors of all encoders that have one."""


def groups(layout: Layout) -> list[tuple[str, ...]]:
    """Names of the encoders of each part of the sequence."""
    return [(part,) if isinstance(part, str) else tuple(part) for part in layout]


def encoders(layout: Layout) -> tuple[str, ...]:
    """Names of all encoders, in the order of the layout."""
    return tuple(name for group in groups(layout) for name in group)


def text_shape(layout: Layout, entries: dict[str, TextEntry]) -> TextShape:
    """Sizes that `layout` gives; `entries` has an entry for each of its names."""
    parts = [[entries[name] for name in group] for group in groups(layout)]
    return TextShape(
        tokens=sum(max(entry.max_tokens for entry in group) for group in parts),
        width=max(sum(entry.width for entry in group) for group in parts),
        pooled_width=sum(entry.pooled_width or 0 for group in parts for entry in group),
    )


def text_problems(
    layout: Layout, entries: dict[str, TextEntry], folder: object, *, model: Any
) -> list[str]:
    """Problems with `conditioning.text_encoders`: missing for a model that reads text, given for
    one that does not, named twice, without a pooled vector.  `model`: its section.
    """
    names, kind = encoders(layout), model.kind
    if not names:
        missing = (
            f"conditioning.text_encoders=[]: model.kind={kind} reads text; name encoders of "
            f"{folder}: {sorted(entries)}"
        )
        return [missing] if model.reads_text else []
    if not model.reads_text:
        return [
            f"conditioning.text_encoders={list(names)}: this model reads no text; use mmdit, "
            "model.text=cross_attention, or leave it out"
        ]
    if len(set(names)) < len(names):
        return [f"conditioning.text_encoders={list(names)}: an encoder is named twice"]
    if (
        model.needs_pooled
        and all(name in entries for name in names)
        and not any(entries[name].pooled_width for name in names)
    ):
        return [
            f"conditioning.text_encoders={list(names)}: none of them has a pooled vector, which "
            "this model is conditioned on: encode with pooled: true for one of them"
        ]
    return []


def caption_problems(layout: Layout, folder: object, *, captions: int, samples: int) -> list[str]:
    """Problems with the captions of a data folder, for a model that reads the text encoders of
    `layout`.
    """
    if not layout or captions:
        return []
    return [
        f"conditioning.text_encoders={list(encoders(layout))}: {folder} holds no captions, 100 % "
        f"of its {samples} samples have none, so that every one would be trained with the null "
        "text: encode a source with captions (.txt, or in .json), or train a model that reads no "
        "text"
    ]
