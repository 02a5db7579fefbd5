"""Where pictures come from and how their bytes become RGB: image folders and WebDataset tars, one record for both.

A source is an image folder `class/name.png` (class ids follow the sorted folder names), a flat folder of pictures
(no classes), a tar, or a folder of tars with samples `<key>.png|jpg|jpeg|webp` + `.cls`, `.txt`, `.json`.
Pixels are uint8 (H, W, 3).  No torch here: `evaluation` reads its reference pictures through this file too.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from lpl_pretrain.config.load import resolve_path
from lpl_pretrain.data.format import BLOCK, split_member_name
from lpl_pretrain.errors import DataError

PICTURE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
MAX_PIXELS = 64_000_000
_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture and what its source says about it; its bytes are read when asked for, from any thread."""

    key: str
    origin: str
    """The file, or `tar:member`: what an error names."""
    path: Path
    offset: int
    size: int
    label: int | None = None
    class_name: str | None = None
    caption: str | None = None

    def read_bytes(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            encoded = file.read(self.size)
        if len(encoded) != self.size:
            raise DataError(f"{self.origin}: read {len(encoded)} bytes, wanted {self.size}: the file changed meanwhile; run again")
        return encoded

    def load(self) -> np.ndarray:
        """uint8 (H, W, 3), upright, on white.  Raises DataError."""
        return decode_picture(self.read_bytes(), self.origin)

    def sha256(self) -> str:
        return hashlib.sha256(self.read_bytes()).hexdigest()


def read_pictures(source: str | list[str]) -> Iterator[Picture]:
    """Every picture of every source, in a fixed order; headers only.  Raises DataError where the reading finds it."""
    seen: set[str] = set()
    texts = [source] if isinstance(source, str) else source
    for text in texts:
        path, before = resolve_path(text), len(seen)
        for picture in _read_source(path):
            if picture.key in seen:
                raise DataError(
                    f"{picture.origin}: key {picture.key!r} is there twice over all sources, wanted unique keys: rename one"
                )
            seen.add(picture.key)
            yield picture
        if len(seen) == before:
            raise DataError(f"{path}: no pictures in it, wanted {', '.join(PICTURE_EXTENSIONS)} files or tars of them")
    if not texts:
        raise DataError("source=[]: no pictures; name an image folder or tars")


def decode_picture(encoded: bytes, origin: str) -> np.ndarray:
    """uint8 (H, W, 3): EXIF orientation applied, transparency composited on white.  The size is checked before decoding."""
    try:
        with Image.open(io.BytesIO(encoded), formats=_PILLOW_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        raise DataError(f"{origin}: too large ({problem}), wanted at most {MAX_PIXELS:,} pixels: shrink or remove it") from None
    except Exception as problem:  # decoders meet arbitrary bytes and raise OSError, SyntaxError, struct.error, EOFError ...
        raise DataError(f"{origin}: not a readable picture ({problem}): replace or remove it") from problem


def to_square(pixels: np.ndarray, resolution_px: int) -> np.ndarray:
    """The central square, resized (Lanczos, antialiased); its pixels as they are when `resolution_px` is its side already."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    if side == resolution_px:
        return pixels[top : top + side, left : left + side]
    box = (left, top, left + side, top + side)  # as resizing the shorter side and then cropping, without the margins in memory
    return np.asarray(Image.fromarray(pixels).resize((resolution_px, resolution_px), Image.Resampling.LANCZOS, box=box))


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips it instead of scaling
        grey = (np.asarray(image).astype(np.int64) * 255 + 32767) // 65535
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _read_source(path: Path) -> Iterator[Picture]:
    if path.is_dir():
        yield from _read_folder(path)
    elif path.is_file() and path.suffix == ".tar":
        yield from _read_tar(path)
    else:
        found = "a file that is no .tar" if path.exists() else "nothing"
        raise DataError(f"{path}: found {found}, wanted an image folder, a .tar, or a folder of tars")


def _read_folder(folder: Path) -> Iterator[Picture]:
    tars = sorted(folder.glob("*.tar"))
    flat = sorted(filter(_is_picture, folder.iterdir()))
    inside = {
        sub: sorted(filter(_is_picture, sub.rglob("*")))
        for sub in sorted(folder.iterdir())
        if sub.is_dir() and not sub.name.startswith(".")
    }
    contents = {"tars": tars, "pictures": flat, "sub-folders of pictures": any(inside.values())}
    if len(kinds := [kind for kind, found in contents.items() if found]) > 1:
        raise DataError(f"{folder}: holds {' and '.join(kinds)}, wanted one of them: name the folder or files that you mean")
    for tar in tars:
        yield from _read_tar(tar)
    for file in flat:
        yield _file_picture(folder, file)
    if not any(inside.values()):
        return
    for label, (sub, files) in enumerate(inside.items()):
        if not files:
            raise DataError(f"{sub}: no pictures in this class folder: fill or remove it (class ids follow the sorted names)")
        for file in files:
            yield _file_picture(folder, file, label, sub.name)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower()[1:] in PICTURE_EXTENSIONS and not path.name.startswith(".") and path.is_file()


def _file_picture(folder: Path, file: Path, label: int | None = None, class_name: str | None = None) -> Picture:
    name = file.relative_to(folder).with_name(file.stem.replace(".", "_") + file.suffix)  # webdataset ends a key at its first dot
    key, _ = split_member_name(name.as_posix(), str(file))
    return Picture(key, str(file), file, 0, file.stat().st_size, label, class_name)


def _read_tar(path: Path) -> Iterator[Picture]:
    with open(path, "rb") as file:
        key = ""
        members: dict[str, tarfile.TarInfo] = {}
        for name, info in _walk_tar(file, path):
            new_key, extension = split_member_name(name, str(path))
            if new_key != key:
                if members:
                    yield _tar_picture(path, file.fileno(), key, members)
                key, members = new_key, {}
            if extension in members:
                raise DataError(f"{path}: member {name!r} is there twice: keys are unique; pack the tar again")
            members[extension] = info
        if members:
            yield _tar_picture(path, file.fileno(), key, members)


def _walk_tar(file: io.BufferedReader, path: Path) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Plain members.  `tarfile` takes a damaged header, or a file cut between members, for the end: that is checked here."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                name = info.name.removeprefix("./")
                if info.isdir() or name.rpartition("/")[2].startswith("."):
                    continue
                if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise DataError(f"{path}: member {name!r} is a link or a device, wanted a plain file: pack the tar again")
                yield name, info
            end = os.pread(file.fileno(), BLOCK, tar.offset)
    except tarfile.TarError as problem:
        raise DataError(f"{path}: truncated, or not a tar ({problem}): fetch it again; decompress it if it is compressed") from None
    if end != bytes(BLOCK):
        raise DataError(
            f"{path}: truncated or damaged: at byte {tar.offset} of {path.stat().st_size} there is neither a member "
            "nor the end mark of a tar: fetch it again"
        )


def _tar_picture(path: Path, fd: int, key: str, members: dict[str, tarfile.TarInfo]) -> Picture:
    where = f"{path}: sample {key!r}"
    found = [extension for extension in PICTURE_EXTENSIONS if extension in members]
    if len(found) != 1:
        raise DataError(
            f"{where}: has {len(found)} pictures (members: {', '.join(sorted(members))}), wanted one of "
            f"{', '.join(PICTURE_EXTENSIONS)}: complete or remove the sample"
        )
    info = members[found[0]]
    texts = {
        str(extension): os.pread(fd, members[extension].size, members[extension].offset_data)
        for extension in ("cls", "txt", "json")
        if extension in members
    }
    return Picture(key, f"{path}:{key}.{found[0]}", path, info.offset_data, info.size, *_parse_texts(texts, where))


def _parse_texts(texts: dict[str, bytes], where: str) -> tuple[int | None, str | None, str | None]:
    """(label, class_name, caption)."""
    label: int | None = None
    facts: Any = {}
    try:
        if "cls" in texts:
            label = int(texts["cls"])
        if "json" in texts:
            facts = json.loads(texts["json"])
        caption = texts["txt"].decode() if "txt" in texts else None
    except ValueError as problem:
        raise DataError(f"{where}: .cls, .json or .txt is not an integer, JSON, UTF-8 ({problem}): correct the member") from None
    if label is not None and label < 0:
        raise DataError(f"{where}: class id {label} is out of range, wanted 0 or more: correct its .cls")
    class_name = facts.get("class_name") if isinstance(facts, dict) else None
    return label, class_name if isinstance(class_name, str) else None, caption
