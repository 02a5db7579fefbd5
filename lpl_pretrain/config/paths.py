"""Paths as a user writes them -> paths of this machine.  The one place that expands `~`.

A configuration keeps what was written, so that it means the same for another user and its identity does not depend on a home
folder; whatever opens a path calls `expand` or `resolve_path` first.
"""

from __future__ import annotations

import importlib.machinery
from pathlib import Path, PurePosixPath

from lpl_pretrain.config.message import one_line
from lpl_pretrain.errors import ConfigError

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def is_url(path: str | Path) -> bool:
    """Something that fsspec opens (s3://, gs://, https://, memory:// ...), rather than a path of this machine."""
    return "://" in str(path)


def expand(text: str | Path) -> Path:
    """`text` with `~` or `~user` at its beginning replaced by that home folder.  Raises ConfigError for an unknown user."""
    try:
        return Path(text).expanduser()
    except (RuntimeError, KeyError):
        raise ConfigError(f"{one_line(str(text))}: its `~` stands for no home folder; write the path out") from None


def expand_folder(text: str) -> str:
    """As `expand`; a URL stays as it is."""
    return text if is_url(text) else str(expand(text))


def resolve_path(text: str) -> Path:
    """`asset:NAME` ships with this package, `package:NAME/PATH` with an installed one; others are paths.  Imports nothing."""
    if text.startswith("package:"):
        return _in_package(text)
    if text.startswith("asset:"):
        return _asset(text)
    return expand(text)


def _in_package(text: str) -> Path:
    name, _, inner = text.removeprefix("package:").partition("/")
    folder = _package_folder(name)
    if folder is None or not _stays_inside(inner) or not (folder / inner).exists():
        raise ConfigError(
            f"{one_line(text)}: no such package, or nothing of that name in it; "
            "wanted package:NAME/PATH of an installed package, or a path"
        )
    return folder / inner


def _package_folder(name: str) -> Path | None:
    """Folder of an installed top-level package, found without importing it."""
    if not (name.isascii() and name.isidentifier()):
        return None
    found = importlib.machinery.PathFinder.find_spec(name)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations)))


def _asset(text: str) -> Path:
    inner = text.removeprefix("asset:")
    if not inner or not _stays_inside(inner) or not (ASSETS / inner).exists():
        shipped = ", ".join(f"asset:{p.name}" for p in sorted(ASSETS.iterdir()))
        raise ConfigError(f"{one_line(text)}: no such asset; the package ships {shipped}")
    return ASSETS / inner


def _stays_inside(inner: str) -> bool:
    """True for a relative path without `..`, which cannot leave the folder that it is joined to."""
    path = PurePosixPath(inner)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in inner
