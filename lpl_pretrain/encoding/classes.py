"""Collects the classes of a source and checks that class ids and names agree in all of it."""

from __future__ import annotations

from lpl_pretrain.config.dataset import MAX_CLASSES
from lpl_pretrain.errors import DataError


class ClassTable:
    """Class ids and names of a source; `add` and `names` raise DataError for a contradiction."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._ids: dict[str, int] = {}
        self._first_of: dict[int, str] = {}  # class id -> first sample of it
        self._unlabelled: str | None = None

    def add(self, where: str, label: int | None, name: str | None = None) -> None:
        """Adds the class of a sample, or of an encoded part; `where` names it in errors."""
        if label is None:
            self._unlabelled = self._unlabelled or where
            return
        if label >= MAX_CLASSES:
            raise _out_of_range(where, label, MAX_CLASSES)
        self._first_of.setdefault(label, where)
        if name is None:
            return
        known_name = self._names.setdefault(label, name)
        known_label = self._ids.setdefault(name, label)
        if (known_name, known_label) != (name, label):
            raise DataError(
                f"{where}: class id {label} is named {name!r}; before, id {label} was "
                f"{known_name!r} and {name!r} was id {known_label}: give all sources the same "
                "classes"
            )

    def names(self) -> list[str]:
        """Name of each class, `str(i)` for a class without a name; empty for images without
        classes.
        """
        if self._unlabelled and self._first_of:
            raise DataError(
                f"{self._unlabelled} has no class, others do: add it, or encode them apart"
            )
        num_classes = 1 + max(self._names or self._first_of, default=-1)
        if self._first_of and max(self._first_of) >= num_classes:
            raise _out_of_range(
                self._first_of[max(self._first_of)], max(self._first_of), num_classes
            )
        return [self._names.get(i, str(i)) for i in range(num_classes)]


def _out_of_range(where: str, label: int, classes: int) -> DataError:
    return DataError(
        f"{where} has class id {label}, wanted 0 to {classes - 1} ({classes} classes): "
        "correct its .cls"
    )
