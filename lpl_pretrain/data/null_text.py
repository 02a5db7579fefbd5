"""Null text: the embeddings of the empty caption, stored beside the shards.  They condition samples
whose text is dropped or missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from safetensors.torch import load
from torch import Tensor

from lpl_pretrain.config.dataset import REMEDY, DatasetIndex, TextEntry, read_bytes
from lpl_pretrain.data.format import null_text_name
from lpl_pretrain.errors import DataError

MAX_HEADER_BYTES = 4096


def read_null_text(
    folder: str, index: DatasetIndex, names: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Encoder name -> `tokens` (T, D) and, if the encoder has one, `pooled` (P,), float32.

    Raises DataError for a file that does not match `index`.
    """
    return {
        name: _read(f"{folder.rstrip('/')}/{null_text_name(name)}", name, index) for name in names
    }


def _read(path: str, name: str, index: DatasetIndex) -> dict[str, Tensor]:
    entry = index.text[name]
    file = index.null_text.get(name)
    max_bytes = 4 * (entry.max_tokens * entry.width + (entry.pooled_width or 0)) + MAX_HEADER_BYTES
    raw = read_bytes(
        path, max_bytes, f"{path}: not found; wanted the empty caption's embeddings: {REMEDY}"
    )
    if file is not None:  # format 2 has no digest
        check_digest(raw, file.bytes, file.sha256, path)
    try:
        tensors = load(raw)
    except Exception as error:  # safetensors raises errors of several kinds on arbitrary bytes
        raise DataError(f"{path}: not a safetensors file ({error}): {REMEDY}") from None
    if problem := _problem(tensors, entry):
        raise DataError(f"{path}: {problem}: {REMEDY}")
    return tensors


def check_digest(raw: bytes, size: int, sha256: str, path: str) -> None:
    """Raises DataError unless `raw` has the size and the digest that index.json records."""
    if len(raw) != size:
        raise DataError(f"{path}: has {len(raw)} bytes, index.json says {size}: {REMEDY}")
    if (actual := hashlib.sha256(raw).hexdigest()) != sha256:
        raise DataError(f"{path}: sha256 is {actual}, index.json says {sha256}: {REMEDY}")


def _problem(tensors: dict[str, Tensor], entry: TextEntry) -> str | None:
    """First mismatch of `tensors` with the encoder's entry in index.json, or None."""
    wanted = ["pooled", "tokens"] if entry.pooled_width else ["tokens"]
    if sorted(tensors) != wanted:
        return f"holds {', '.join(sorted(tensors))[:200]}, wanted {' and '.join(wanted)}"
    for name, tensor in tensors.items():
        if tensor.dtype is not torch.float32 or not bool(torch.isfinite(tensor).all()):
            return f"{name} is not of finite float32 numbers"
    tokens = tensors["tokens"]
    if (
        tokens.dim() != 2
        or tokens.shape[1] != entry.width
        or not 0 < len(tokens) <= entry.max_tokens
    ):
        return (
            f"tokens has shape {tuple(tokens.shape)}, wanted up to ({entry.max_tokens}, "
            f"{entry.width})"
        )
    if entry.pooled_width and tensors["pooled"].shape != (entry.pooled_width,):
        return f"pooled has shape {tuple(tensors['pooled'].shape)}, wanted ({entry.pooled_width},)"
    return None
