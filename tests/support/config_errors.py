"""What every refusal of a configuration has to look like, and texts that have broken one."""

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
"""What pydantic says of itself: its sentences, its names of types, and names of our classes."""
MAX_LINES, MAX_CHARACTERS = 21, 8000
AnySection = TypeVar("AnySection", bound=Section)


def check_error_message(error: LPLError) -> None:
    """A few printable lines in our words."""
    text = str(error)
    assert text and len(text) <= MAX_CHARACTERS, len(text)
    lines = text.split("\n")
    assert len(lines) <= MAX_LINES, len(lines)
    assert all(line.isprintable() for line in lines), text
    assert not (found := PYDANTIC_WORDS.search(re.sub(r"'[^']*'|\"[^\"]*\"", "", text))), (
        found,
        text,
    )


def load_or_check_error(
    cls: type[AnySection], path: Path, overrides: Sequence[str] = ()
) -> AnySection | None:
    """None for a refusal, which is checked; what is accepted has to load back equal from its own
    dump.
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
        if not all(
            isinstance(part, str | int | bool) for part in inner
        ):  # not the words of a Literal
            own = metadata if len(inner) == 1 else ()
            return [leaf for part in inner for leaf in leaves(part, own, path)]
        return []
    return [(path, annotation, metadata)]
