"""Lists the images of a source: image folders and WebDataset tars, local or at an fsspec URL.

A source is an image folder `class/name.png` (class ids follow the sorted folder names), a flat
folder of images (no classes), a tar, or a folder of tars with samples `<key>.png|jpg|jpeg|webp` +
`.cls`, `.txt`, `.json`: the layout of webdataset and img2dataset.  A unit is one tar or one image
folder.
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
from lpl_pretrain.encoding.source_image import IMAGE_EXTENSIONS, BadImage, SourceImage
from lpl_pretrain.encoding.tars import read_tar
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.log import log


@dataclass(frozen=True, slots=True)
class SourceUnit:
    """One tar, or one image folder."""

    origin: str
    """Path or URL."""
    files: tuple[SourceImage, ...] | None
    """The images of an image folder; None for a tar, which is read on request."""
    size: int
    """Bytes of a tar; 0 for a folder."""

    @property
    def is_remote_tar(self) -> bool:
        return self.files is None and is_url(self.origin)

    def images(
        self, fetch: Callable[[str], Path] | None = None, start: int = 0
    ) -> Iterator[SourceImage | BadImage]:
        """The images in a fixed order; those of a local tar from the sample at byte `start` on.

        `fetch` downloads a remote tar, whose images can be read while the file exists.  Raises
        DataError for a remote tar without it.
        """
        if self.files is not None:
            yield from self.files
        elif not self.is_remote_tar:
            yield from read_tar(Path(self.origin), self.origin, start)
        elif fetch is not None:
            yield from read_tar(fetch(self.origin), self.origin)
        else:
            raise DataError(
                f"{self.origin}: images are read here only from local tars: copy it to this machine"
            )


def list_units(source: str | list[str]) -> list[SourceUnit]:
    """Every unit of every source, in the order given; reads names and sizes only.

    Raises DataError for a source that cannot be listed, or that mixes tars and images.
    """
    origins = [source] if isinstance(source, str) else source
    if not origins:
        raise DataError("source=[]: no images; name an image folder or tars")
    return [
        unit
        for origin in origins
        for unit in _list_source(origin if is_url(origin) else str(resolve_path(origin)))
    ]


def list_images(source: str | list[str]) -> Iterator[SourceImage]:
    """Every image of every local source, in a fixed order; reads headers only.

    Raises DataError at the first bad image or repeated key.
    """
    keys: set[str] = set()
    for unit in list_units(source):
        keys_before = len(keys)
        for image in unit.images():
            if isinstance(image, BadImage):
                raise DataError(image.reason)
            if image.key in keys:
                raise DataError(
                    f"{image.origin}: key {image.key!r} is there twice over all sources, "
                    "wanted unique keys: rename one"
                )
            keys.add(image.key)
            yield image
        if len(keys) == keys_before:
            raise no_images(unit.origin)


def no_images(origin: str) -> DataError:
    """Error for a source without images."""
    return DataError(
        f"{origin}: no images in it, wanted {', '.join(IMAGE_EXTENSIONS)} files or tars of them"
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
    except (OSError, ValueError) as error:
        raise DataError(
            f"{origin!r}: cannot be listed ({error}): check the path and its permissions"
        ) from None
    actual = "a file that is no .tar" if path.exists() else "nothing"
    raise DataError(
        f"{origin}: found {actual}, wanted an image folder, a .tar, or a folder of tars"
    )


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its sub-folders, sorted.

    Raises OSError for a folder that cannot be listed; Path.rglob ignores one silently.
    """

    def raise_error(error: OSError) -> None:
        raise error

    paths = (
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=raise_error)
        for name in names
    )
    return sorted(path for path in paths if path.is_file())


def _list_url(origin: str) -> list[SourceUnit]:
    """Units of a URL, which may have wildcards if its file system can list:
    s3://bucket/{00000..00099}.tar is written s3://bucket/000*.tar.
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
        sizes = {
            str(PurePosixPath(name).relative_to(root)): int(entry["size"])
            for name, entry in sorted(files.find(root, detail=True).items())
        }
    except Exception as error:  # drivers behind fsspec raise errors of their own
        raise DataError(
            f"{origin}: cannot be listed ({error}): check the address, the credentials and "
            "fsspec's driver"
        ) from None
    return _list_folder(origin.rstrip("/"), sizes, [])


def _list_folder(origin: str, sizes: dict[str, int], folders: list[str]) -> list[SourceUnit]:
    """Units of a folder; `sizes`: relative name -> bytes of every file, `folders`: all
    sub-folders, empty ones included.
    """
    names = [
        name
        for name in sorted(sizes, key=lambda name: name.split("/"))
        if not any(part.startswith(".") for part in name.split("/"))
    ]
    tars = [name for name in names if name.endswith(".tar") and "/" not in name]
    flat = [name for name in names if _is_image(name) and "/" not in name]
    by_class: dict[str, list[str]] = {
        folder: [] for folder in sorted(folders) if not folder.startswith(".")
    }
    for name in names:
        if "/" in name:
            by_class.setdefault(name.split("/")[0], []).extend([name] if _is_image(name) else [])
    ignored = [name for name in names if not _is_image(name) and name not in tars]
    if ignored:
        log.info(
            "%s: %d files are neither images nor tars and are ignored, such as %s",
            origin,
            len(ignored),
            ignored[0],
        )
    contents = {"tars": tars, "images": flat, "sub-folders of images": any(by_class.values())}
    if len(kinds := [kind for kind, present in contents.items() if present]) != 1:
        if not kinds:
            raise no_images(origin)
        raise DataError(
            f"{origin}: holds {' and '.join(kinds)}, wanted one of them: name the folder or files "
            "that you mean"
        )
    if tars:
        return [SourceUnit(f"{origin}/{name}", None, sizes[name]) for name in tars]
    images = [_file_image(origin, name, sizes[name]) for name in flat]
    if not flat:
        for label, (folder, members) in enumerate(by_class.items()):
            if not members:
                raise DataError(
                    f"{origin}/{folder}: no images in this class folder: fill or remove it "
                    "(class ids follow the sorted names)"
                )
            images += [_file_image(origin, name, sizes[name], label, folder) for name in members]
    return [SourceUnit(origin, tuple(images), 0)]


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower()[1:] in IMAGE_EXTENSIONS


def _file_image(
    origin: str, name: str, size: int, label: int | None = None, class_name: str | None = None
) -> SourceImage:
    path = PurePosixPath(name)
    where = f"{origin}/{name}"
    # webdataset ends a key at its first dot
    undotted = path.with_name(path.stem.replace(".", "_") + path.suffix)
    key, _ = split_member_name(str(undotted), where)
    return SourceImage(key, where, where, 0, size, label, class_name)
