"""Shard format: a plain tar of latents that webdataset can read; data/shard.py reads it without
copies.

Samples are in the order of their keys, the members of a sample in the order of their names:
    <key>.cls                    class id in ASCII; -1: no class
    <key>.json                   metadata of the image (encoding/part_encoder.py)
    <key>.moments.npy            (2C, H, W) mean, then standard deviation, of the posterior;
                                 float16, or the bits of bfloat16 as uint16, a type that numpy
                                 lacks: torch.from_numpy(bits).view(torch.bfloat16)
    <key>.moments_flipped.npy    the same of the mirrored image, if it was encoded
    <key>.text_<name>.npy        (T, D) embeddings of the caption's T tokens by encoder <name>;
                                 float16, or int8 to be multiplied by the scale
    <key>.text_<name>_scale.npy  (T,) float16, with int8
    <key>.text_<name>_pooled.npy (P,) float16, if the encoder gives one and the configuration
                                 requests it
    <key>.txt                    caption in UTF-8, if there is one
A key has no dot after its last slash, because webdataset starts the extension at that dot.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from lpl_pretrain.data.tar import BLOCK, split_member_name, tar_member, walk_tar
from lpl_pretrain.errors import DataError

NO_CLASS = -1
MOMENTS = "moments.npy"
FLIPPED = "moments_flipped.npy"
LABEL = "cls"
METADATA = "json"
CAPTION = "txt"
REQUIRED = (MOMENTS, LABEL, METADATA)
"""Members that every sample has."""
NUMPY_DTYPES = {"fp16": "<f2", "bf16": "<u2"}
"""numpy types of stored moments, by `moments_dtype` of index.json."""


@dataclass(frozen=True, slots=True)
class CaptionEmbedding:
    """Embedding of one caption by one text encoder, as stored; T is its length without padding."""

    tokens: np.ndarray  # (T, D) float16 or int8
    scale: np.ndarray | None = None  # (T,) float16, with int8
    pooled: np.ndarray | None = None  # (P,) float16

    def floats(self) -> np.ndarray:
        """(T, D) float32"""
        states = self.tokens.astype(np.float32)
        return states if self.scale is None else states * self.scale.astype(np.float32)[:, None]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image as a shard stores it."""

    key: str
    moments: np.ndarray  # (2C, H, W) float16, or uint16: the bits of bfloat16
    label: int | None = None
    caption: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    flipped: np.ndarray | None = None  # as moments
    text: dict[str, CaptionEmbedding] = field(default_factory=dict)

    def members(self) -> dict[str, bytes]:
        """Extension -> content; a function of the sample alone (no clock, no owner)."""
        members = {
            LABEL: str(NO_CLASS if self.label is None else self.label).encode(),
            METADATA: json.dumps(self.metadata, sort_keys=True).encode(),
            MOMENTS: _npy_bytes(self.moments),
        }
        if self.flipped is not None:
            members[FLIPPED] = _npy_bytes(self.flipped)
        for name, text in self.text.items():
            arrays = (text.tokens, text.scale, text.pooled)
            for extension, array in zip(text_members(name), arrays, strict=True):
                if array is not None:
                    members[extension] = _npy_bytes(array)
        if self.caption is not None:
            members[CAPTION] = self.caption.encode()
        return dict(sorted(members.items()))


def null_text_name(name: str) -> str:
    """File of a folder with the embedding of the empty caption: `tokens` (T, D) float32, and
    `pooled` (P,) if the encoder has one.
    """
    return f"text_{name}.null.safetensors"


def text_members(name: str) -> tuple[str, str, str]:
    """Extensions of one encoder's tokens, scale and pooled vector."""
    return f"text_{name}.npy", f"text_{name}_scale.npy", f"text_{name}_pooled.npy"


def shard_name(part: str, number: int, bucket: str) -> str:
    return f"latents-{part}-{number:03d}-{bucket}.tar"


def pack_sample(sample: Sample) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """(tar members of one sample, extension -> (offset in these bytes, size) of each content)."""
    packed = bytearray()
    spans = {}
    for extension, content in sample.members().items():
        member = tar_member(f"{sample.key}.{extension}", content)
        header_bytes = len(member) - len(content) - -len(content) % BLOCK
        spans[extension] = (len(packed) + header_bytes, len(content))
        packed += member
    return bytes(packed), spans


def scan_shard(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> extension -> (offset, size), in the order of the tar, read from its headers.

    Raises DataError for a truncated or damaged tar, a missing member, a repeated key.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with open(path, "rb") as file:
        for name, offset, size in walk_tar(file.fileno(), path):
            key, extension = split_member_name(name, f"{path}")
            members = samples.setdefault(key, {})
            if extension in members:
                raise DataError(
                    f"{path}: sample {key!r} is there twice ({name}), wanted unique keys: encode "
                    "the folder again"
                )
            members[extension] = (offset, size)
    for key, members in samples.items():
        if missing := [extension for extension in REQUIRED if extension not in members]:
            raise DataError(
                f"{path}: sample {key!r} has {', '.join(members)}, but no {missing[0]}: encode the "
                "folder again"
            )
    return samples


@lru_cache(maxsize=1024)
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Header of our .npy members of this type and shape."""
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _npy_bytes(array: np.ndarray) -> bytes:
    return npy_header(array.dtype.str, array.shape) + array.tobytes()
