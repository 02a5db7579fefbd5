"""Base class of every section of a configuration, and the types that several of them share."""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainSerializer,
    PositiveFloat,
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
"""As PathText, for a path that every machine has in its configuration and few use: `expand`
replaces its `~` then.
"""
PathText = Annotated[
    str, AfterValidator(_expanded_path), PlainSerializer(_as_written, when_used="json")
]
"""A path or URL: printable, not empty, no longer than file systems allow; `~` is expanded, and
saved as it was written.
"""
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _read_integer(value: Any) -> Any:
    """As `_read_number`; pydantic then refuses a fraction."""
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


READERS = {"int": _read_integer, "float": _read_number}


def _exact(schema: Any) -> Any:
    """The schema with numbers read by READERS and `bool` and `str` strict, wherever they are in it."""
    if isinstance(schema, list | tuple):
        return type(schema)(_exact(part) for part in schema)
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if kind in ("bool", "str"):
        return {**schema, "strict": True}
    if kind in READERS:
        finite: Any = {**schema, **({"allow_inf_nan": False} if kind == "float" else {})}
        return core_schema.no_info_before_validator_function(READERS[kind], finite)
    if kind == "function-before" and schema["function"]["function"] in READERS.values():
        return schema  # of a section inside this one, which has been through here
    return {
        key: part if key in ("default", "metadata") else _exact(part)
        for key, part in schema.items()
    }


class Section(BaseModel):
    """Frozen; unknown keys are refused; numbers, text, true and false are never converted into one
    another.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        own: Any = handler.resolve_ref_schema(schema)
        exact = _exact(own)
        own.clear()
        own.update(exact)
        return schema


class OnError(str, Enum):
    """What becomes of a sample that cannot be read: an error that names it, or another sample in
    its place, counted and logged.
    """

    STOP = "stop"
    SKIP = "skip"


class WeightingConfig(Section):
    kind: Literal["uniform", "min_snr", "soft_min_snr", "p2", "sigmoid"] = "uniform"
    """Formulas and sources: diffusion/weighting.py."""
    gamma: PositiveFloat = 5.0
    """SNR from which min_snr stops growing, and around which soft_min_snr bends."""
    k: PositiveFloat = 1.0
    """p2: added to the SNR."""
    power: PositiveFloat = 1.0
    """p2: exponent of SNR + k."""
    bias: float = 0.0
    """sigmoid: log-SNR at which the weight is a half."""
