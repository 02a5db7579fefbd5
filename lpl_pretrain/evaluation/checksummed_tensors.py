"""Safetensors files that evaluation keeps between processes: each tensor with its sha256, so that a
flipped bit is seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.atomic import atomic_write
from lpl_pretrain.runtime.tensors import safetensors_blocks

PREFIX = "sha256 "
"""In the header: this and the tensor's name, and behind it its digest."""


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    there = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digests = {f"{PREFIX}{name}": digest(tensor) for name, tensor in there.items()}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.writelines(safetensors_blocks(there, {**digests, **(metadata or {})}))


def load_tensors(
    path: Path, names: Iterable[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, or those of `names` that are there, and the other metadata.

    Raises DataError for a damaged file.  A file without any digest is of an older version, and is
    read without that check.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            there = set(file.keys())
            tensors = {
                name: file.get_tensor(name)
                for name in (there if names is None else there.intersection(names))
            }
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    digests = {
        key.removeprefix(PREFIX): metadata.pop(key)
        for key in list(metadata)
        if key.startswith(PREFIX)
    }
    if digests and digests.keys() != there:
        raise DataError(f"{path}: its tensors are not those whose digests it has: it was changed")
    for name, tensor in tensors.items():
        if digests and digest(tensor) != digests[name]:
            raise DataError(
                f"{path}: {name} has another sha256 than when it was written: it is damaged"
            )
    return tensors, metadata


def digest(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
