"""Which classes a source has: ids and names agree over all of it, or the first that does not is
named.
"""

from __future__ import annotations

from collections.abc import Mapping

from lpl_pretrain.config.dataset import MAX_CLASSES
from lpl_pretrain.errors import DataError


class ClassTable:
    """`add` what each picture, or each encoded part, says; then `names`.  Both raise DataError."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._ids: dict[str, int] = {}
        self._first_of: dict[int, str] = {}  # class id -> where it was seen first
        self._unlabelled: str | None = None

    def add(self, where: str, label: int | None, name: str | None = None) -> None:
        """`where` names the sample in errors."""
        if label is None:
            self._unlabelled = self._unlabelled or where
            return
        if label >= MAX_CLASSES:
            raise _out_of_range(where, label, MAX_CLASSES)
        self._first_of.setdefault(label, where)
        if name is not None and (
            self._names.setdefault(label, name),
            self._ids.setdefault(name, label),
        ) != (name, label):
            raise DataError(
                f"{where}: class id {label} is named {name!r}; before, id {label} was "
                f"{self._names[label]!r} "
                f"and {name!r} was id {self._ids[name]}: give all sources the same classes"
            )

    def names(self) -> list[str]:
        """Name of class i, `str(i)` where the source gives none; empty when the pictures have no
        classes.
        """
        if self._unlabelled and self._first_of:
            raise DataError(
                f"{self._unlabelled} has no class, others do: add it, or encode them apart"
            )
        count = 1 + max(self._names or self._first_of, default=-1)
        if self._first_of and max(self._first_of) >= count:
            raise _out_of_range(self._first_of[max(self._first_of)], max(self._first_of), count)
        return [self._names.get(i, str(i)) for i in range(count)]

    def known_names(self) -> Mapping[int, str]:
        return self._names


def _out_of_range(where: str, label: int, classes: int) -> DataError:
    return DataError(
        f"{where} has class id {label}, wanted 0 to {classes - 1} ({classes} classes): "
        "correct its .cls"
    )
