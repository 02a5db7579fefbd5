"""Base class of every section of a configuration, and the types that several of them use."""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainSerializer,
)
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from lpl_pretrain.config.names import name_problem, path_problem
from lpl_pretrain.config.paths import home_expanded

MAX_INT = 2**63
SCIENTIFIC = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
"""Numbers such as 3e-4, which YAML 1.1 reads as text."""
REFUSED_TEXT = "unusable_text"
"""Type of the errors of Name and PathText; their message needs no translation."""


def _checked_name(text: str) -> str:
    if problem := name_problem(text):
        raise PydanticCustomError(REFUSED_TEXT, "{problem}", {"problem": problem})
    return text


def _checked_path(text: str) -> str:
    if problem := path_problem(text):
        raise PydanticCustomError(REFUSED_TEXT, "{problem}", {"problem": problem})
    return text


def _expanded_path(text: str) -> str:
    checked = _checked_path(text)
    try:
        return home_expanded(checked)
    except ValueError as error:
        raise PydanticCustomError(REFUSED_TEXT, "{problem}", {"problem": str(error)}) from None


def _as_written(path: str) -> str:
    return getattr(path, "written", path)


Name = Annotated[str, AfterValidator(_checked_name)]
"""A name that becomes a file or folder name: one component of a path, printable, of at most 200
bytes in UTF-8.
"""
UnexpandedPath = Annotated[str, AfterValidator(_checked_path)]
"""A path whose `~` is expanded by `paths.expand` when it is used: every configuration has it, few
runs use it.
"""
PathText = Annotated[
    str, AfterValidator(_expanded_path), PlainSerializer(_as_written, when_used="json")
]
"""A path or URL: printable, not empty, no longer than file systems allow; `~` is expanded, and
saved as it was written.
"""
UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]
"""A number in [0, 1]."""


class OnError(str, Enum):
    """Reaction to a sample that cannot be read: stop with an error that names it, or use another
    sample instead, counted and logged.
    """

    STOP = "stop"
    SKIP = "skip"


def _with_exact_scalars(schema: Any) -> Any:
    """Copy of a core schema, a tree of dicts and lists, in which no scalar converts its input:
    pydantic would read "3" and true as 3, and 1 as true.

    pydantic's own strict mode is no alternative: it also refuses a list for a tuple and a text for
    an enum, which is what YAML has for them.
    """
    if isinstance(schema, list | tuple):
        return type(schema)(_with_exact_scalars(part) for part in schema)
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if kind in ("bool", "str"):
        return {**schema, "strict": True}
    if kind == "int":
        return core_schema.no_info_before_validator_function(_read_integer, _core(schema))
    if kind == "float":
        finite = {**schema, "allow_inf_nan": False}
        return core_schema.no_info_before_validator_function(_read_number, _core(finite))
    if kind == "function-before" and schema["function"]["function"] in (
        _read_integer,
        _read_number,
    ):
        return schema  # a number of a section inside this one, which was converted on its own
    return {
        key: part if key in ("default", "metadata") else _with_exact_scalars(part)
        for key, part in schema.items()
    }


def _core(schema: dict[str, Any]) -> Any:
    """`schema`, typed for pydantic_core, which has a TypedDict for each kind."""
    return schema


def _read_integer(value: Any) -> Any:
    """Refuse what `_read_number` refuses; pydantic then refuses a fraction."""
    if isinstance(value, bool | str) and not _is_scientific(value):
        raise PydanticKnownError("int_type")
    return _read_number(value)


def _read_number(value: Any) -> Any:
    """Refuse true and false, text other than 3e-4, and integers that 64 bits cannot hold."""
    if isinstance(value, bool | str):
        if not _is_scientific(value):
            raise PydanticKnownError("float_type")
        value = float(value)
    if isinstance(value, int) and not -MAX_INT <= value < MAX_INT:
        raise PydanticKnownError("int_parsing_size")
    return value


def _is_scientific(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 40 and SCIENTIFIC.fullmatch(value) is not None


class Section(BaseModel):
    """Frozen; unknown keys are refused; numbers, text, true and false are never converted into one
    another.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Called by pydantic when the class is defined: returns what validates its instances."""
        schema = handler(source)
        definition: Any = handler.resolve_ref_schema(schema)
        exact = _with_exact_scalars(definition)
        definition.clear()
        definition.update(exact)
        return schema
