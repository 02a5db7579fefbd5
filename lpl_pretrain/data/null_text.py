"""The embeddings of the empty caption, which lie beside the shards: what a sample without text is
conditioned on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from safetensors.torch import load
from torch import Tensor

from lpl_pretrain.config.dataset import DatasetIndex, TextEntry, read_bytes
from lpl_pretrain.data.format import DAMAGED, null_text_name
from lpl_pretrain.errors import DataError

HEADER_BYTES = 4096
"""Room for the header of a null text file."""


def read_null_text(
    folder: str, index: DatasetIndex, names: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """By encoder: `tokens` (T, D) and, where there is one, `pooled` (P,), float32.

    Raises DataError for a file that is not the one that `index` describes.
    """
    return {
        name: _read(f"{folder.rstrip('/')}/{null_text_name(name)}", name, index) for name in names
    }


def _read(path: str, name: str, index: DatasetIndex) -> dict[str, Tensor]:
    entry, file = index.text[name], index.null_text.get(name)
    most = 4 * (entry.max_tokens * entry.width + (entry.pooled_width or 0)) + HEADER_BYTES
    raw = read_bytes(
        path, most, f"{path}: not found; wanted the empty caption's embeddings: {DAMAGED}"
    )
    if file is not None:  # format 2 has no digest
        check_digest(raw, file.bytes, file.sha256, path)
    try:
        found = load(raw)
    except Exception as error:  # safetensors raises errors of several kinds on arbitrary bytes
        raise DataError(f"{path}: not a safetensors file ({error}): {DAMAGED}") from None
    if problem := _problem(found, entry):
        raise DataError(f"{path}: {problem}: {DAMAGED}")
    return found


def check_digest(raw: bytes, size: int, sha256: str, path: str) -> None:
    """Raises DataError unless `raw` is what index.json means."""
    if len(raw) != size:
        raise DataError(f"{path}: has {len(raw)} bytes, index.json says {size}: {DAMAGED}")
    if (found := hashlib.sha256(raw).hexdigest()) != sha256:
        raise DataError(f"{path}: sha256 is {found}, index.json says {sha256}: {DAMAGED}")


def _problem(found: dict[str, Tensor], entry: TextEntry) -> str | None:
    wanted = ["pooled", "tokens"] if entry.pooled_width else ["tokens"]
    if sorted(found) != wanted:
        return f"holds {', '.join(sorted(found))[:200]}, wanted {' and '.join(wanted)}"
    for name, tensor in found.items():
        if tensor.dtype is not torch.float32 or not bool(torch.isfinite(tensor).all()):
            return f"{name} is not of finite float32 numbers"
    tokens = found["tokens"]
    if (
        tokens.dim() != 2
        or tokens.shape[1] != entry.width
        or not 0 < len(tokens) <= entry.max_tokens
    ):
        return (
            f"tokens has shape {tuple(tokens.shape)}, wanted up to ({entry.max_tokens}, "
            f"{entry.width})"
        )
    if entry.pooled_width and found["pooled"].shape != (entry.pooled_width,):
        return f"pooled has shape {tuple(found['pooled'].shape)}, wanted ({entry.pooled_width},)"
    return None
