"""The embeddings of the empty caption, which lie beside the shards: what a sample without text is conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fsspec
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lpl_pretrain.config.dataset import is_url
from lpl_pretrain.data.format import null_text_name
from lpl_pretrain.errors import DataError


def read_empty_captions(folder: str, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """By encoder: `tokens` (T, D) and, where there is one, `pooled` (P,).  Raises DataError."""
    return {name: _read(f"{folder.rstrip('/')}/{null_text_name(name)}") for name in names}


def _read(path: str) -> dict[str, Tensor]:
    try:
        if not is_url(path):
            return load(Path(path).read_bytes())
        with fsspec.open(path, "rb") as file:
            return load(file.read())
    except (OSError, ValueError, ImportError, SafetensorError) as problem:
        raise DataError(f"{path}: cannot be read ({problem}); wanted the empty caption's embeddings: encode again") from None
