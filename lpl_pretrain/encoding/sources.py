"""Where pictures come from: image folders and WebDataset tars, here or behind an fsspec URL, one record for all.

A source is an image folder `class/name.png` (class ids follow the sorted folder names), a flat folder of pictures (no
classes), a tar, or a folder of tars with samples `<key>.png|jpg|jpeg|webp` + `.cls`, `.txt`, `.json`: the layout of
webdataset and img2dataset.  A unit is what can be read by itself: one tar, or one image folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np

from lpl_pretrain.config.dataset import is_url
from lpl_pretrain.config.load import resolve_path
from lpl_pretrain.data.format import BLOCK, split_member_name
from lpl_pretrain.encoding.images import decode_picture
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.log import log

PICTURE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
STAMP_BYTES = 64


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture and what its source says about it; its bytes are read when asked for, from any thread."""

    key: str
    origin: str
    """The file, or `tar:member`: what an error names."""
    path: str
    """A file of this machine, or a URL."""
    offset: int
    size: int
    label: int | None = None
    class_name: str | None = None
    caption: str | None = None
    start: int = 0
    """Of its sample in a tar, from where reading can begin."""

    def read_bytes(self) -> bytes:
        encoded = self._read(self.offset, self.size)
        if len(encoded) != self.size:
            raise DataError(f"{self.origin}: read {len(encoded)} bytes, wanted {self.size}: the file changed meanwhile; run again")
        return encoded

    def load(self) -> np.ndarray:
        """uint8 (H, W, 3), upright, on white.  Raises DataError."""
        return decode_picture(self.read_bytes(), self.origin)

    def sha256(self) -> str:
        return hashlib.sha256(self.read_bytes()).hexdigest()

    def stamp(self) -> str:
        """Changes with what the source says and, as far as size and last bytes tell, with the picture."""
        tail = b"" if is_url(self.path) else self._read(self.offset + max(0, self.size - STAMP_BYTES), min(self.size, STAMP_BYTES))
        return json.dumps([self.key, self.size, tail.hex(), self.label, self.class_name, self.caption])

    def _read(self, offset: int, size: int) -> bytes:
        try:
            with fsspec.open(self.path, "rb") if is_url(self.path) else open(self.path, "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as problem:
            raise DataError(f"{self.origin}: cannot be read ({problem}): check the file, or run again") from None


@dataclass(frozen=True, slots=True)
class Problem:
    """What stands in a picture's place when its source is damaged there."""

    origin: str
    reason: str
    """The whole sentence of an error: place, found, wanted, remedy."""


@dataclass(frozen=True, slots=True)
class Unit:
    origin: str
    """Path or URL of a tar, or of an image folder."""
    files: tuple[Picture, ...] | None
    """The pictures of an image folder, sorted; None for a tar, which is read when asked for."""
    size: int
    """Bytes of a tar; 0 for a folder."""

    @property
    def is_remote_tar(self) -> bool:
        return self.files is None and is_url(self.origin)

    def pictures(self, fetch: Callable[[str], Path] | None = None, start: int = 0) -> Iterator[Picture | Problem]:
        """In a fixed order, of a local tar from the sample at byte `start` on.

        `fetch` brings a remote tar here; its pictures can be read while the file is there.
        """
        if self.files is not None:
            yield from self.files
        elif not self.is_remote_tar:
            yield from _read_tar(Path(self.origin), self.origin, start)
        elif fetch is not None:
            yield from _read_tar(fetch(self.origin), self.origin)
        else:
            raise DataError(f"{self.origin}: pictures are read from here only from local tars: copy it to this machine")


def list_units(source: str | list[str]) -> list[Unit]:
    """Every unit of every source, in the order given; reads names and sizes only.  Raises DataError."""
    texts = [source] if isinstance(source, str) else source
    if not texts:
        raise DataError("source=[]: no pictures; name an image folder or tars")
    return [unit for text in texts for unit in _list_source(text if is_url(text) else str(resolve_path(text)))]


def read_pictures(source: str | list[str]) -> Iterator[Picture]:
    """Every picture of every local source, in a fixed order; headers only.  Raises DataError where the reading finds it."""
    seen: set[str] = set()
    for unit in list_units(source):
        before = len(seen)
        for picture in unit.pictures():
            if isinstance(picture, Problem):
                raise DataError(picture.reason)
            if picture.key in seen:
                raise DataError(
                    f"{picture.origin}: key {picture.key!r} is there twice over all sources, wanted unique keys: rename one"
                )
            seen.add(picture.key)
            yield picture
        if len(seen) == before:
            raise no_pictures(unit.origin)


def no_pictures(origin: str) -> DataError:
    return DataError(f"{origin}: no pictures in it, wanted {', '.join(PICTURE_EXTENSIONS)} files or tars of them")


def _list_source(origin: str) -> list[Unit]:
    if is_url(origin):
        return _list_url(origin)
    path = Path(origin)
    if path.is_dir():
        found = sorted(entry for entry in path.rglob("*") if entry.is_file())
        sizes = {entry.relative_to(path).as_posix(): entry.stat().st_size for entry in found}
        return _list_folder(origin, sizes, [sub.name for sub in path.iterdir() if sub.is_dir()])
    if path.is_file() and path.suffix == ".tar":
        return [Unit(origin, None, path.stat().st_size)]
    found_there = "a file that is no .tar" if path.exists() else "nothing"
    raise DataError(f"{origin}: found {found_there}, wanted an image folder, a .tar, or a folder of tars")


def _list_url(origin: str) -> list[Unit]:
    """A URL may hold wildcards, if its file system can list: s3://bucket/{00000..00099}.tar is written s3://bucket/000*.tar."""
    try:
        files, root = fsspec.core.url_to_fs(origin)
        if "*" in root:
            return [Unit(files.unstrip_protocol(name), None, files.size(name)) for name in sorted(files.glob(root))]
        if root.endswith(".tar"):
            return [Unit(origin, None, files.size(root))]
        found = files.find(root, detail=True)
        sizes = {str(PurePosixPath(name).relative_to(root)): int(entry["size"]) for name, entry in sorted(found.items())}
    except (OSError, ValueError, ImportError) as problem:
        raise DataError(f"{origin}: cannot be listed ({problem}): check the address, the credentials and fsspec's driver") from None
    return _list_folder(origin.rstrip("/"), sizes, [])


def _list_folder(origin: str, sizes: dict[str, int], folders: list[str]) -> list[Unit]:
    """`sizes`: relative name -> bytes of every file; `folders`: the sub-folders, which may be empty."""
    names = [
        name for name in sorted(sizes, key=lambda name: name.split("/")) if not any(p.startswith(".") for p in name.split("/"))
    ]
    tars = [name for name in names if name.endswith(".tar") and "/" not in name]
    flat = [name for name in names if _is_picture(name) and "/" not in name]
    inside: dict[str, list[str]] = {folder: [] for folder in sorted(folders) if not folder.startswith(".")}
    for name in names:
        if "/" in name:
            inside.setdefault(name.split("/")[0], []).extend([name] if _is_picture(name) else [])
    left_out = [name for name in names if not _is_picture(name) and name not in tars]
    if left_out:
        log.info("%s: %d files are neither pictures nor tars and are left out, such as %s", origin, len(left_out), left_out[0])
    contents = {"tars": tars, "pictures": flat, "sub-folders of pictures": any(inside.values())}
    if len(kinds := [kind for kind, found in contents.items() if found]) != 1:
        if not kinds:
            raise no_pictures(origin)
        raise DataError(f"{origin}: holds {' and '.join(kinds)}, wanted one of them: name the folder or files that you mean")
    if tars:
        return [Unit(f"{origin}/{name}", None, sizes[name]) for name in tars]
    pictures = [_file_picture(origin, name, sizes[name]) for name in flat]
    if not flat:
        for label, (folder, members) in enumerate(inside.items()):
            if not members:
                raise DataError(
                    f"{origin}/{folder}: no pictures in this class folder: fill or remove it (class ids follow the sorted names)"
                )
            pictures += [_file_picture(origin, name, sizes[name], label, folder) for name in members]
    return [Unit(origin, tuple(pictures), 0)]


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower()[1:] in PICTURE_EXTENSIONS


def _file_picture(origin: str, name: str, size: int, label: int | None = None, class_name: str | None = None) -> Picture:
    path, where = PurePosixPath(name), f"{origin}/{name}"
    undotted = path.with_name(path.stem.replace(".", "_") + path.suffix)  # webdataset ends a key at its first dot
    key, _ = split_member_name(str(undotted), where)
    return Picture(key, where, where, 0, size, label, class_name)


def _read_tar(path: Path, origin: str, start: int = 0) -> Iterator[Picture | Problem]:
    """`origin` names the tar in errors; `path` is where it lies now.  What is wrong beside a sample is told behind it."""
    key, members, beside = "", dict[str, tarfile.TarInfo](), list[Problem]()
    with open(path, "rb") as file:
        file.seek(start)

        def finished() -> Iterator[Picture | Problem]:
            if members:
                yield _tar_picture(path, origin, file.fileno(), key, members)
            yield from beside

        try:
            for name, info in _walk_tar(file, path, origin):
                if isinstance(parsed := _parse_member(name, info, origin), Problem):
                    beside.append(parsed)
                    continue
                new_key, extension = parsed
                if new_key != key:
                    yield from finished()
                    key, members, beside = new_key, {}, []
                if extension in members:
                    beside.append(Problem(origin, f"{origin}: member {name!r} is there twice: keys are unique; pack the tar again"))
                else:
                    members[extension] = info
        except DataError as problem:  # nothing behind this place can be found; the sample before it may not be whole
            yield from beside
            yield Problem(origin, str(problem))
            return
        yield from finished()


def _walk_tar(file: io.BufferedReader, path: Path, origin: str) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Plain members.  `tarfile` takes a damaged header, or a file cut between members, for the end: that is checked here."""
    size = path.stat().st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                name = info.name.removeprefix("./")
                if info.isdir() or name.rpartition("/")[2].startswith("."):
                    continue
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"member {name!r} ends behind the file")
                yield name, info
            end = os.pread(file.fileno(), BLOCK, tar.offset)
    except tarfile.TarError as problem:
        raise DataError(
            f"{origin}: truncated, or not a tar ({problem}): fetch it again; decompress it if it is compressed"
        ) from None
    if end != bytes(BLOCK):
        raise DataError(
            f"{origin}: truncated or damaged: at byte {tar.offset} of {size} there is neither a member "
            "nor the end mark of a tar: fetch it again"
        )


def _parse_member(name: str, info: tarfile.TarInfo, origin: str) -> tuple[str, str] | Problem:
    """(key, extension)"""
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return Problem(origin, f"{origin}: member {name!r} is a link or a device, wanted a plain file: pack the tar again")
    try:
        return split_member_name(name, origin)
    except DataError as problem:
        return Problem(origin, str(problem))


def _tar_picture(path: Path, origin: str, fd: int, key: str, members: dict[str, tarfile.TarInfo]) -> Picture | Problem:
    where = f"{origin}: sample {key!r}"
    found = [extension for extension in PICTURE_EXTENSIONS if extension in members]
    if len(found) != 1:
        return Problem(
            where,
            f"{where}: has {len(found)} pictures (members: {', '.join(sorted(members))}), wanted one of "
            f"{', '.join(PICTURE_EXTENSIONS)}: complete or remove the sample",
        )
    info = members[found[0]]
    texts = {
        str(extension): os.pread(fd, members[extension].size, members[extension].offset_data)
        for extension in ("cls", "txt", "json")
        if extension in members
    }
    try:
        said = _parse_texts(texts, where)
    except DataError as problem:
        return Problem(where, str(problem))
    start = min(member.offset for member in members.values())
    return Picture(key, f"{origin}:{key}.{found[0]}", str(path), info.offset_data, info.size, *said, start)


def _parse_texts(texts: dict[str, bytes], where: str) -> tuple[int | None, str | None, str | None]:
    """(label, class_name, caption); the caption is .txt, or else what img2dataset writes into .json."""
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
    facts = facts if isinstance(facts, dict) else {}
    class_name, told = facts.get("class_name"), facts.get("caption")
    if caption is None and isinstance(told, str):
        caption = told
    return label, class_name if isinstance(class_name, str) else None, caption
