"""Translation of pydantic's errors about a configuration into our messages, with our keys."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from lpl_pretrain.config.base import MAX_INT, REFUSED_TEXT
from lpl_pretrain.config.message import short, shorten
from lpl_pretrain.config.renamed_keys import new_key

MAPPING, LIST = "wanted a section, which is a mapping of keys to values", "wanted a list"
TEXT = "wanted text (in quotes where it looks like a number, a date, true, false or null)"
OTHER_KIND: dict[str, str] = {
    "int_type": "wanted an integer",
    "float_type": "wanted a number",
    "bool_type": "wanted true or false",
    "string_type": TEXT,
    "list_type": LIST,
    "tuple_type": LIST,
    "dict_type": MAPPING,
    "model_type": MAPPING,
    "model_attributes_type": MAPPING,
    "union_tag_not_found": MAPPING,
    "none_required": "wanted null",
}
"""Type of an error about a value of another kind than the field's -> what is wanted."""
OF_ITS_KIND: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "int_from_float": lambda ctx: "wanted an integer, without a fraction",
    "int_parsing_size": lambda ctx: f"wanted a number below {MAX_INT}",
    "finite_number": lambda ctx: "wanted a finite number",
    "greater_than": lambda ctx: f"wanted a number greater than {ctx['gt']}",
    "greater_than_equal": lambda ctx: f"wanted a number greater than or equal to {ctx['ge']}",
    "less_than": lambda ctx: f"wanted a number less than {ctx['lt']}",
    "less_than_equal": lambda ctx: f"wanted a number less than or equal to {ctx['le']}",
    "multiple_of": lambda ctx: f"wanted a multiple of {ctx['multiple_of']}",
    "string_unicode": lambda ctx: "wanted text that UTF-8 can hold",
    "string_pattern_mismatch": lambda ctx: f"wanted text of the form {ctx['pattern']}",
    "string_too_short": lambda ctx: f"wanted at least {ctx['min_length']} characters",
    "string_too_long": lambda ctx: f"wanted at most {ctx['max_length']} characters",
    "too_short": lambda ctx: (
        f"has {ctx['actual_length']} values, wanted at least {ctx['min_length']}"
    ),
    "too_long": lambda ctx: (
        f"has {ctx['actual_length'] or 'too many'} values, wanted {ctx['max_length']}"
    ),
    "literal_error": lambda ctx: f"wanted {ctx['expected']}",
    "enum": lambda ctx: f"wanted {ctx['expected']}",
    "recursion_loop": lambda ctx: "holds itself",
    "invalid_key": lambda ctx: "keys are text; put it in quotes",
    REFUSED_TEXT: lambda ctx: ctx["problem"],
}
"""Type of an error about the value itself -> what is wanted, from pydantic's context."""
HANDLED = {"extra_forbidden", "missing", "union_tag_invalid", "value_error"}
"""Types of errors that `_explain` words by itself."""


@dataclass(frozen=True)
class Location:
    keys: tuple[str, ...]
    section: type[BaseModel]
    """The section that the last key is in, or should be in."""
    union: Any = None
    """Annotation with several members that is at `keys`, when the error is about one of its
    members.
    """
    beyond: tuple[str, ...] = ()
    """Keys below `keys` in that member."""
    is_key: bool = False
    """The error is about the last key, not about its value."""

    @property
    def path(self) -> str:
        return ".".join(_shown_key(key) for key in (*self.keys, *self.beyond))


def problems_of(cls: type[BaseModel], error: ValidationError) -> list[str]:
    """One line for each wrong key or value."""
    groups: dict[Any, list[tuple[Location, Any]]] = {}
    for number, problem in enumerate(error.errors(include_url=False)):
        place = locate(cls, problem["loc"])
        groups.setdefault(number if place.union is None else place.keys, []).append(
            (place, problem)
        )
    name = cls.__name__
    return [line for group in groups.values() for line in dict.fromkeys(_lines(group, name))]


def _lines(group: list[tuple[Location, Any]], config_class: str) -> list[str]:
    """Problem of one value: as the member of a union whose type it has, or that it has none of its
    types.
    """
    place, problem = group[0]
    if place.union is None:
        return [_explain(place, problem, config_class)]
    fitting = [
        (other, its)
        for other, its in group
        if other.beyond or other.is_key or its["type"] not in OTHER_KIND | {"literal_error": ""}
    ]
    if fitting:
        return [_explain(other, its, config_class) for other, its in fitting]
    wanted = " or ".join(dict.fromkeys(_described(member) for member in _members(place.union)))
    return [f"{place.path}={short(problem['input'])}: wanted {wanted}"]


def _explain(place: Location, problem: Any, config_class: str) -> str:
    path, kind, context = place.path, problem["type"], problem.get("ctx") or {}
    if kind == "extra_forbidden":
        if renamed := new_key(config_class, ".".join(place.keys)):
            return f"{path}: this key is called {renamed} now; rename it"
        return f"{path}: unknown key; {_hint(place.keys[-1], place.section)}"
    if kind == "missing":
        return f"{path}: missing, and it has no default"
    if kind == "union_tag_invalid":
        return f"{path}.kind={short(context['tag'])}: wanted one of {context['expected_tags']}"
    if kind == "value_error":
        message = str(context["error"])
        return f"{path}: {message}" if path else message
    wanted = OTHER_KIND.get(kind) or OF_ITS_KIND.get(kind, lambda ctx: "not a value of this key")(
        context
    )
    if place.is_key:
        return f"{path}: its key {wanted}"
    return (
        f"{path}={short(problem['input'])}: {wanted}"
        if path
        else f"found {short(problem['input'])}: {wanted}"
    )


def _hint(key: str, section: type[BaseModel]) -> str:
    known = list(section.model_fields)
    close = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def locate(cls: type[BaseModel], location: Iterable[str | int]) -> Location:
    """The keys of pydantic's location, without its names for the members of unions."""
    keys: list[str] = []
    annotation: Any = cls
    section, parts = cls, list(location)
    for number, part in enumerate(parts):
        annotation = _bare(annotation)
        if part == "[key]" and number == len(parts) - 1:
            return Location(tuple(keys), section, is_key=True)
        if len(members := _members(annotation)) > 1:
            if not (tagged := _tagged(members)):
                beyond = parts[number + 1 :]
                is_key = beyond[-1:] == ["[key]"]
                return Location(
                    tuple(keys),
                    section,
                    annotation,
                    tuple(map(str, beyond[:-1] if is_key else beyond)),
                    is_key,
                )
            annotation = tagged.get(part)
            continue
        keys.append(str(part))
        annotation = members[0]
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
            field = annotation.model_fields.get(str(part))
            annotation = None if field is None else field.annotation
        else:
            annotation = _element(annotation, part)
    return Location(tuple(keys), section)


def _bare(annotation: Any) -> Any:
    return _bare(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a union but null; anything else is its own."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return [annotation]
    return [
        member
        for part in get_args(annotation)
        if part is not type(None)
        for member in _members(_bare(part))
    ]


def _tagged(members: list[Any]) -> dict[Any, type[BaseModel]]:
    """Members by their `kind`; empty if one has none."""
    if not all(isinstance(member, type) and issubclass(member, BaseModel) for member in members):
        return {}
    return {member.model_fields["kind"].default: member for member in members}


def _element(annotation: Any, part: str | int) -> Any:
    """Annotation of what a list or mapping holds."""
    origin, inner = (
        get_origin(annotation),
        [arg for arg in get_args(annotation) if arg is not Ellipsis],
    )
    if not inner:
        return None
    if origin is tuple and isinstance(part, int) and part < len(inner):
        return inner[part]
    return inner[-1]


def _described(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(map(repr, get_args(annotation)))
    names = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
    names |= {list: "a list", tuple: "a list", dict: "a mapping"}
    return names.get(origin or annotation, "a section")


def _shown_key(key: str) -> str:
    if not key or not key.isprintable() or len(key) > 60:
        return shorten(short(key), 60)
    return key
