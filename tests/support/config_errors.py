"""Checks of error messages about configurations, and of what a loaded configuration dumps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel

from lpl_pretrain.config.base import Section
from lpl_pretrain.config.load import dump, load_config
from lpl_pretrain.errors import LPLError

PYDANTIC_WORDS = re.compile(
    r"pydantic|Input should|Value error|Field required|Extra inputs|union_tag|\[type=|input_value|"
    r"function-(after|before|wrap)|constrained|_checked_|_read_|\b(tuple|list|dict|literal|nullable)\[|"
    r"valid (integer|number|string|boolean|list|tuple|dictionary)|"
    r"\b(string|int|float|bool|list|tuple|dict|literal|enum|value)_(type|parsing|error)\b|[A-Za-z]+Config\b"
)
"""Phrases that must not reach a user: sentences and type names of pydantic, our class names."""
MAX_LINES, MAX_CHARACTERS = 21, 8000
AnySection = TypeVar("AnySection", bound=Section)


def check_error_message(error: LPLError) -> None:
    """Check that an error is a few printable lines without internal names."""
    text = str(error)
    assert text and len(text) <= MAX_CHARACTERS, len(text)
    lines = text.split("\n")
    assert len(lines) <= MAX_LINES, len(lines)
    assert all(line.isprintable() for line in lines), text
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", text)
    internal = PYDANTIC_WORDS.search(unquoted)
    assert not internal, (internal, text)


def load_or_check_error(
    cls: type[AnySection], path: Path, overrides: Sequence[str] = ()
) -> AnySection | None:
    """Load a configuration and check that its dump loads back equal; None if it is refused.

    The error of a refusal is checked with `check_error_message`.
    """
    try:
        config = load_config(cls, path, overrides)
    except LPLError as error:
        check_error_message(error)
        return None
    again = path.with_name("again.yaml")
    again.write_text(dump(config))
    assert load_config(cls, again) == config, again.read_text()
    return config


def leaves(
    annotation: Any, metadata: Sequence[Any] = (), path: str = ""
) -> list[tuple[str, Any, Sequence[Any]]]:
    """(dotted key, type, metadata) of every value that a section may hold."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return leaves(inner, [*metadata, *more], path)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [
            leaf
            for name, field in annotation.model_fields.items()
            for leaf in leaves(field.annotation, field.metadata, f"{path}.{name}" if path else name)
        ]
    if inner := [
        part
        for part in get_args(annotation)
        if part not in (type(None), Ellipsis) and get_origin(annotation)
    ]:
        literal = all(isinstance(part, str | int | bool) for part in inner)
        if not literal:
            own = metadata if len(inner) == 1 else ()
            return [leaf for part in inner for leaf in leaves(part, own, path)]
        return []
    return [(path, annotation, metadata)]
