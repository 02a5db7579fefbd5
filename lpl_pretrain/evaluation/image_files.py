"""How evaluation writes: under a temporary name, then renamed, so that a file that exists is whole;
pictures as a grid.
"""

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


def publish_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def publish_grid(path: Path, pixels: Tensor) -> None:
    """uint8 (N, 3, H, W), row by row, as square a grid as N allows, on white."""
    with atomic_write(path) as temporary:
        grid(pixels).save(temporary, format="PNG", optimize=True)


def publish_pictures(folder: Path, pixels: Iterable[Tensor], facts: list[dict[str, Any]]) -> None:
    """folder/00000000.png ...; the text chunk `lpl_pretrain` of each is its `facts` as JSON."""
    for name, (data, _) in _named(pixels, facts):
        with atomic_write(folder / f"{name}.png") as temporary:
            temporary.write_bytes(data)


def publish_tar(path: Path, pixels: Iterable[Tensor], facts: list[dict[str, Any]]) -> None:
    """A WebDataset shard of `<key>.png` and `<key>.json`; the same bytes for the same pictures."""
    with (
        atomic_write(path) as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, (picture, told) in _named(pixels, facts):
            for suffix, data in (("png", picture), ("json", told)):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def publish_npz(path: Path, pixels: Iterable[Tensor], shape: tuple[int, int, int, int]) -> None:
    """`arr_0`, uint8 (N, H, W, 3) of this `shape`, as OpenAI's evaluator and its kin read it;
    written batch by batch.
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


def _named(
    batches: Iterable[Tensor], facts: list[dict[str, Any]]
) -> Iterator[tuple[str, tuple[bytes, bytes]]]:
    """(name, (PNG, JSON)) of every picture of `batches` (N, 3, H, W)."""
    pictures = (picture for batch in batches for picture in batch.permute(0, 2, 3, 1).cpu().numpy())
    for number, (picture, fact) in enumerate(zip(pictures, facts, strict=True)):
        told, info, buffer = json.dumps(fact), PngInfo(), io.BytesIO()
        info.add_text("lpl_pretrain", told)
        Image.fromarray(picture).save(buffer, format="PNG", pnginfo=info)
        yield f"{number:08d}", (buffer.getvalue(), told.encode())


def grid(pixels: Tensor) -> Image.Image:
    count, _, height, width = pixels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full(
        (rows * (height + GAP_PX) - GAP_PX, columns * (width + GAP_PX) - GAP_PX, 3),
        255,
        dtype=np.uint8,
    )
    for i, picture in enumerate(pixels.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = i // columns * (height + GAP_PX), i % columns * (width + GAP_PX)
        canvas[top : top + height, left : left + width] = picture
    return Image.fromarray(canvas)
