"""Where pictures come from: image folders and WebDataset tars, here or behind an fsspec URL, one
record for all.

A source is an image folder `class/name.png` (class ids follow the sorted folder names), a flat
folder of pictures (no classes), a tar, or a folder of tars with samples `<key>.png|jpg|jpeg|webp` +
`.cls`, `.txt`, `.json`: the layout of webdataset and img2dataset.  A unit is what can be read by
itself: one tar, or one image folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import fsspec

from lpl_pretrain.config.load import resolve_path
from lpl_pretrain.config.paths import is_url
from lpl_pretrain.data.tar import split_member_name
from lpl_pretrain.encoding.pictures import PICTURE_EXTENSIONS, Picture, Problem
from lpl_pretrain.encoding.tars import read_tar
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.log import log


@dataclass(frozen=True, slots=True)
class SourceUnit:
    origin: str
    """Path or URL of a tar, or of an image folder."""
    files: tuple[Picture, ...] | None
    """The pictures of an image folder, sorted; None for a tar, which is read when asked for."""
    size: int
    """Bytes of a tar; 0 for a folder."""

    @property
    def is_remote_tar(self) -> bool:
        return self.files is None and is_url(self.origin)

    def pictures(
        self, fetch: Callable[[str], Path] | None = None, start: int = 0
    ) -> Iterator[Picture | Problem]:
        """In a fixed order, of a local tar from the sample at byte `start` on.

        `fetch` brings a remote tar here; its pictures can be read while the file is there.
        """
        if self.files is not None:
            yield from self.files
        elif not self.is_remote_tar:
            yield from read_tar(Path(self.origin), self.origin, start)
        elif fetch is not None:
            yield from read_tar(fetch(self.origin), self.origin)
        else:
            raise DataError(
                f"{self.origin}: pictures are read from here only from local tars: copy it to "
                "this machine"
            )


def list_units(source: str | list[str]) -> list[SourceUnit]:
    """Every unit of every source, in the order given; reads names and sizes only.  Raises
    DataError.
    """
    texts = [source] if isinstance(source, str) else source
    if not texts:
        raise DataError("source=[]: no pictures; name an image folder or tars")
    return [
        unit
        for text in texts
        for unit in _list_source(text if is_url(text) else str(resolve_path(text)))
    ]


def read_pictures(source: str | list[str]) -> Iterator[Picture]:
    """Every picture of every local source, in a fixed order; headers only.  Raises DataError where
    the reading finds it.
    """
    seen: set[str] = set()
    for unit in list_units(source):
        before = len(seen)
        for picture in unit.pictures():
            if isinstance(picture, Problem):
                raise DataError(picture.reason)
            if picture.key in seen:
                raise DataError(
                    f"{picture.origin}: key {picture.key!r} is there twice over all sources, "
                    "wanted unique keys: rename one"
                )
            seen.add(picture.key)
            yield picture
        if len(seen) == before:
            raise no_pictures(unit.origin)


def no_pictures(origin: str) -> DataError:
    return DataError(
        f"{origin}: no pictures in it, wanted {', '.join(PICTURE_EXTENSIONS)} files or tars of them"
    )


def _list_source(origin: str) -> list[SourceUnit]:
    if is_url(origin):
        return _list_url(origin)
    path = Path(origin)
    try:
        if path.is_dir():
            sizes = {
                file.relative_to(path).as_posix(): file.stat().st_size for file in files_below(path)
            }
            return _list_folder(origin, sizes, [sub.name for sub in path.iterdir() if sub.is_dir()])
        if path.is_file() and path.suffix == ".tar":
            return [SourceUnit(origin, None, path.stat().st_size)]
    except (OSError, ValueError) as problem:
        raise DataError(
            f"{origin!r}: cannot be listed ({problem}): check the path and its permissions"
        ) from None
    found_there = "a file that is no .tar" if path.exists() else "nothing"
    raise DataError(
        f"{origin}: found {found_there}, wanted an image folder, a .tar, or a folder of tars"
    )


def files_below(folder: Path) -> list[Path]:
    """Sorted.  Raises OSError for a folder that cannot be listed, which Path.rglob passes over in
    silence.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = (
        Path(parent, name) for parent, _, names in os.walk(folder, onerror=refuse) for name in names
    )
    return sorted(path for path in found if path.is_file())


def _list_url(origin: str) -> list[SourceUnit]:
    """A URL may hold wildcards, if its file system can list: s3://bucket/{00000..00099}.tar is
    written s3://bucket/000*.tar.
    """
    try:
        files, root = fsspec.core.url_to_fs(origin)
        if "*" in root:
            return [
                SourceUnit(files.unstrip_protocol(name), None, files.size(name))
                for name in sorted(files.glob(root))
            ]
        if root.endswith(".tar"):
            return [SourceUnit(origin, None, files.size(root))]
        found = files.find(root, detail=True)
        sizes = {
            str(PurePosixPath(name).relative_to(root)): int(entry["size"])
            for name, entry in sorted(found.items())
        }
    except Exception as problem:  # drivers behind fsspec raise errors of their own
        raise DataError(
            f"{origin}: cannot be listed ({problem}): check the address, the credentials and "
            "fsspec's driver"
        ) from None
    return _list_folder(origin.rstrip("/"), sizes, [])


def _list_folder(origin: str, sizes: dict[str, int], folders: list[str]) -> list[SourceUnit]:
    """`sizes`: relative name -> bytes of every file; `folders`: the sub-folders, which may be
    empty.
    """
    names = [
        name
        for name in sorted(sizes, key=lambda name: name.split("/"))
        if not any(p.startswith(".") for p in name.split("/"))
    ]
    tars = [name for name in names if name.endswith(".tar") and "/" not in name]
    flat = [name for name in names if _is_picture(name) and "/" not in name]
    inside: dict[str, list[str]] = {
        folder: [] for folder in sorted(folders) if not folder.startswith(".")
    }
    for name in names:
        if "/" in name:
            inside.setdefault(name.split("/")[0], []).extend([name] if _is_picture(name) else [])
    left_out = [name for name in names if not _is_picture(name) and name not in tars]
    if left_out:
        log.info(
            "%s: %d files are neither pictures nor tars and are left out, such as %s",
            origin,
            len(left_out),
            left_out[0],
        )
    contents = {"tars": tars, "pictures": flat, "sub-folders of pictures": any(inside.values())}
    if len(kinds := [kind for kind, found in contents.items() if found]) != 1:
        if not kinds:
            raise no_pictures(origin)
        raise DataError(
            f"{origin}: holds {' and '.join(kinds)}, wanted one of them: name the folder or files "
            "that you mean"
        )
    if tars:
        return [SourceUnit(f"{origin}/{name}", None, sizes[name]) for name in tars]
    pictures = [_file_picture(origin, name, sizes[name]) for name in flat]
    if not flat:
        for label, (folder, members) in enumerate(inside.items()):
            if not members:
                raise DataError(
                    f"{origin}/{folder}: no pictures in this class folder: fill or remove it "
                    "(class ids follow the sorted names)"
                )
            pictures += [
                _file_picture(origin, name, sizes[name], label, folder) for name in members
            ]
    return [SourceUnit(origin, tuple(pictures), 0)]


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower()[1:] in PICTURE_EXTENSIONS


def _file_picture(
    origin: str, name: str, size: int, label: int | None = None, class_name: str | None = None
) -> Picture:
    path, where = PurePosixPath(name), f"{origin}/{name}"
    undotted = path.with_name(
        path.stem.replace(".", "_") + path.suffix
    )  # webdataset ends a key at its first dot
    key, _ = split_member_name(str(undotted), where)
    return Picture(key, where, where, 0, size, label, class_name)
