"""Writes images, atomically: a grid as PNG, a folder of PNGs, a WebDataset tar, an .npz."""

from __future__ import annotations

import io
import json
import math
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lpl_pretrain.runtime.atomic import atomic_write

GAP_PX = 2
"""Width of the white lines between the images of a grid."""


def write_grid(path: Path, pixels: Tensor) -> None:
    """Write uint8 (N, 3, H, W) as one PNG: row by row, as square as N allows, on white."""
    with atomic_write(path) as temporary:
        image_grid(pixels).save(temporary, format="PNG", optimize=True)


def write_pngs(folder: Path, pixels: Iterable[Tensor], metadata: list[dict[str, Any]]) -> None:
    """Write folder/00000000.png ..., each with its metadata as JSON in text chunk `lpl_pretrain`.

    `pixels`: batches, uint8 (N, 3, H, W).
    """
    for name, png, _ in _encoded(pixels, metadata):
        with atomic_write(folder / f"{name}.png") as temporary:
            temporary.write_bytes(png)


def write_tar(path: Path, pixels: Iterable[Tensor], metadata: list[dict[str, Any]]) -> None:
    """Write a WebDataset shard of `<key>.png` and `<key>.json`; equal images give equal bytes."""
    with (
        atomic_write(path) as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, png, text in _encoded(pixels, metadata):
            for suffix, data in (("png", png), ("json", text)):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_npz(path: Path, pixels: Iterable[Tensor], shape: tuple[int, int, int, int]) -> None:
    """Write `arr_0`, uint8 (N, H, W, 3) of this `shape`, batch by batch.

    OpenAI's evaluator and tools like it read this.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        atomic_write(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for batch in pixels:
            file.write(batch.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())


def image_grid(pixels: Tensor) -> Image.Image:
    """Arrange uint8 (N, 3, H, W) as one image."""
    count, _, height, width = pixels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full(
        (rows * (height + GAP_PX) - GAP_PX, columns * (width + GAP_PX) - GAP_PX, 3),
        255,
        dtype=np.uint8,
    )
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).cpu().numpy()):
        top = i // columns * (height + GAP_PX)
        left = i % columns * (width + GAP_PX)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


def _encoded(
    batches: Iterable[Tensor], metadata: list[dict[str, Any]]
) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield (name, PNG, JSON) of every image of `batches`, each uint8 (N, 3, H, W)."""
    images = (image for batch in batches for image in batch.permute(0, 2, 3, 1).cpu().numpy())
    for index, (image, entry) in enumerate(zip(images, metadata, strict=True)):
        text = json.dumps(entry)
        info = PngInfo()
        info.add_text("lpl_pretrain", text)
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG", pnginfo=info)
        yield f"{index:08d}", buffer.getvalue(), text.encode()
