"""Which classes a source has: ids and names are checked over all of it before the first picture is encoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lpl_pretrain.data.images import Picture
from lpl_pretrain.errors import DataError

MAX_CLASSES = 100_000


@dataclass(frozen=True, slots=True)
class Survey:
    samples: int
    classes: list[str]
    """Name of class i, `str(i)` where the source gives none; empty when the pictures have no classes."""


def survey(pictures: Iterable[Picture]) -> Survey:
    """Reads no picture.  Raises DataError for ids out of range, names that contradict, and classes on some pictures only."""
    samples = 0
    names: dict[int, str] = {}
    ids: dict[str, int] = {}
    first_of: dict[int, Picture] = {}
    unlabelled: Picture | None = None
    for picture in pictures:
        samples += 1
        label, name = picture.label, picture.class_name
        if label is None:
            unlabelled = unlabelled or picture
            continue
        if label >= MAX_CLASSES:
            raise _out_of_range(picture, MAX_CLASSES)
        first_of.setdefault(label, picture)
        if name is not None and (names.setdefault(label, name), ids.setdefault(name, label)) != (name, label):
            raise DataError(
                f"{picture.origin}: class id {label} is named {name!r}; before, id {label} was {names[label]!r} "
                f"and {name!r} was id {ids[name]}: give all sources the same classes"
            )
    if unlabelled and first_of:
        raise DataError(f"{unlabelled.origin}: sample {unlabelled.key!r} has no class, others do: add it, or encode them apart")
    count = 1 + max(names or first_of, default=-1)
    if first_of and max(first_of) >= count:
        raise _out_of_range(first_of[max(first_of)], count)
    return Survey(samples, [names.get(i, str(i)) for i in range(count)])


def _out_of_range(picture: Picture, classes: int) -> DataError:
    return DataError(
        f"{picture.origin}: sample {picture.key!r} has class id {picture.label}, wanted 0 to {classes - 1} "
        f"({classes} classes): correct its .cls"
    )
