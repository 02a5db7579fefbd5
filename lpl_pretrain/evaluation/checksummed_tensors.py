"""Safetensors files with a sha256 for each tensor, so that a flipped bit is noticed on reading."""

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
"""Start of a metadata key in the header; the tensor's name follows, the value is its digest."""


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors and their digests, atomically."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digests = {f"{PREFIX}{name}": digest(tensor) for name, tensor in on_cpu.items()}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.writelines(safetensors_blocks(on_cpu, {**digests, **(metadata or {})}))


def load_tensors(
    path: Path, names: Iterable[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors, or those of `names` that the file has, and the metadata.

    Raises DataError for a damaged file.  A file without any digest is of an older version, and is
    read without that check.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            stored = set(file.keys())
            tensors = {
                name: file.get_tensor(name)
                for name in (stored if names is None else stored.intersection(names))
            }
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    digests = {
        key.removeprefix(PREFIX): metadata.pop(key)
        for key in list(metadata)
        if key.startswith(PREFIX)
    }
    if digests and digests.keys() != stored:
        raise DataError(
            f"{path}: its header has digests of other tensors than the file: it was changed"
        )
    for name, tensor in tensors.items():
        if digests and digest(tensor) != digests[name]:
            raise DataError(
                f"{path}: {name} has another sha256 than when it was written: it is damaged"
            )
    return tensors, metadata


def digest(tensor: Tensor) -> str:
    """Hexadecimal sha256 of dtype, shape and bytes."""
    sha256 = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
