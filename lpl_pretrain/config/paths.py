"""Paths as a user writes them -> paths of this machine.  `~` is expanded here and nowhere else.

Fields of a configuration are expanded as they are read (PathText in config/base.py), arguments of
the command line by `expand`.
"""

from __future__ import annotations

import importlib.machinery
import os
from pathlib import Path, PurePosixPath

from lpl_pretrain.config.message import one_line, short
from lpl_pretrain.config.names import is_url, path_problem
from lpl_pretrain.errors import ConfigError

ASSETS = Path(__file__).resolve().parent.parent / "assets"


class ExpandedPath(str):
    """A path whose `~` is expanded; what is saved of it, and compared between starts of a run, is
    what was written.
    """

    written: str

    def __new__(cls, path: str, written: str = "") -> ExpandedPath:
        self = super().__new__(cls, path)
        self.written = written or path
        return self


def home_expanded(text: str) -> str:
    """`text` with `~` or `~user` at its beginning replaced by that home folder; a URL as it is.

    Raises ValueError for an unknown user.
    """
    if not text.startswith("~") or is_url(text):
        return text
    try:
        return ExpandedPath(str(Path(text).expanduser()), text)
    except (RuntimeError, KeyError):
        raise ValueError("its `~` stands for no home folder; write the path out") from None


def expand(text: str | Path) -> Path:
    """Path of an argument of the command line.  Raises ConfigError for text that can be no path."""
    if problem := path_problem(str(text)):
        raise ConfigError(f"{short(str(text))}: {problem}")
    try:
        return Path(home_expanded(str(text)))
    except ValueError as problem:
        raise ConfigError(f"{one_line(str(text))}: {problem}") from None


def resolve_path(text: str) -> Path:
    """`asset:NAME` ships with this package, `package:NAME/PATH` with an installed one; others are
    paths.  Imports nothing.
    """
    if text.startswith("package:"):
        return _in_package(text)
    if text.startswith("asset:"):
        return _asset(text)
    return expand(text)


def _in_package(text: str) -> Path:
    name, _, inner = text.removeprefix("package:").partition("/")
    folder = _package_folder(name)
    if folder is None or not _stays_inside(inner) or not os.path.exists(folder / inner):
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
    if not inner or not _stays_inside(inner) or not os.path.exists(ASSETS / inner):
        shipped = ", ".join(f"asset:{p.name}" for p in sorted(ASSETS.iterdir()))
        raise ConfigError(f"{one_line(text)}: no such asset; the package ships {shipped}")
    return ASSETS / inner


def _stays_inside(inner: str) -> bool:
    """True for a relative path without `..`, which cannot leave the folder that it is joined to."""
    path = PurePosixPath(inner)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in inner
