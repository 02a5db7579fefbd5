"""A validator for the keywords that our JSON schemas use; it refuses a schema with any other."""

from __future__ import annotations

import re
from typing import Any

ANNOTATIONS = {"$schema", "$defs", "title", "description", "default", "examples"}
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}


def schema_errors(value: Any, schema: Any, root: dict[str, Any], path: str = "") -> list[str]:
    """Errors of `value`, each with its path; empty for a valid one."""
    if isinstance(schema, bool):
        return [] if schema else [f"{path}: not allowed"]
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")] | {
            key: part for key, part in schema.items() if key != "$ref"
        }
    errors = []
    for keyword, wanted in schema.items():
        if keyword in ANNOTATIONS or keyword in ("then", "else"):
            continue
        errors += [f"{path}: {text}" for text in _simple(keyword, value, wanted)]
        errors += _nested(keyword, value, wanted, schema, root, path)
    return errors


def _simple(keyword: str, value: Any, wanted: Any) -> list[str]:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        "type": lambda: (
            isinstance(value, TYPES[wanted])
            and (not isinstance(value, bool) or wanted in ("boolean", "null"))
        ),
        "const": lambda: value == wanted,
        "enum": lambda: value in wanted,
        "minimum": lambda: not is_number or value >= wanted,
        "maximum": lambda: not is_number or value <= wanted,
        "exclusiveMinimum": lambda: not is_number or value > wanted,
        "exclusiveMaximum": lambda: not is_number or value < wanted,
        "pattern": lambda: not isinstance(value, str) or re.search(wanted, value) is not None,
        "minItems": lambda: not isinstance(value, list) or len(value) >= wanted,
        "maxItems": lambda: not isinstance(value, list) or len(value) <= wanted,
        "required": lambda: not isinstance(value, dict) or set(wanted) <= value.keys(),
    }
    if keyword not in fits:
        return []
    return [] if fits[keyword]() else [f"{value!r} does not fit {keyword}: {wanted}"]


SIMPLE = {
    *("type", "const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("pattern", "minItems", "maxItems", "required"),
}


def _nested(
    keyword: str, value: Any, wanted: Any, schema: dict[str, Any], root: dict[str, Any], path: str
) -> list[str]:
    if keyword in SIMPLE:
        return []
    if keyword == "anyOf":
        tries = [schema_errors(value, part, root, path) for part in wanted]
        return [] if not all(tries) else [f"{path}: fits none of anyOf: {tries}"]
    if keyword == "not":
        return [] if schema_errors(value, wanted, root, path) else [f"{path}: fits {wanted}"]
    if keyword == "if":
        branch = "else" if schema_errors(value, wanted, root, path) else "then"
        return schema_errors(value, schema.get(branch, True), root, path)
    if keyword == "properties":
        inner = [(key, value[key], part) for key, part in wanted.items() if key in _mapping(value)]
    elif keyword == "additionalProperties":
        known = schema.get("properties", {})
        inner = [(key, part, wanted) for key, part in _mapping(value).items() if key not in known]
    elif keyword == "propertyNames":
        inner = [(key, key, wanted) for key in _mapping(value)]
    elif keyword == "items":
        inner = [(index, part, wanted) for index, part in enumerate(_sequence(value))]
    elif keyword == "prefixItems":
        inner = [
            (index, part, schema)
            for index, (part, schema) in enumerate(zip(_sequence(value), wanted, strict=False))
        ]
    else:
        raise AssertionError(f"{path}: the keyword {keyword!r} is not known to this validator")
    return [
        error
        for key, part, part_schema in inner
        for error in schema_errors(part, part_schema, root, f"{path}.{key}")
    ]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
