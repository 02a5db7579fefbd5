"""JSON schemas of our YAML files (configs/schema/*.json), for editors that complete and check them.

A file may name a `base:` and say only what differs, so that keys are required of a file without a
base alone, and of elements of lists, which replace those of the base.  Relations between keys are
not in a schema: loading a file checks them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

from lpl_pretrain.config.base import Section
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.schema import TrainConfig

FILE_CLASSES: dict[str, type[Section]] = {
    "train": TrainConfig,
    "encode": EncodeConfig,
    "evaluate": EvaluateConfig,
    "cluster": ClusterProfile,
}
"""Folder below configs/ -> class of its files."""
DIALECT = "https://json-schema.org/draft/2020-12/schema"
BASE_KEY = {
    "title": "Base",
    "description": "Another file, by a path relative to this one: its keys are the defaults, and "
    "mappings merge unless their `kind` differs.",
    "type": "string",
}
NAMED_SCHEMAS = ("$defs", "properties")
SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SCHEMAS = ("items", "additionalProperties", "propertyNames")
LIST_ELEMENTS = ("items", "prefixItems")
Schema = dict[str, Any]


def schema_text(kind: str) -> str:
    """Content of configs/schema/<kind>.json."""
    return json.dumps(file_schema(kind), indent=2, ensure_ascii=False) + "\n"


def file_schema(kind: str) -> Schema:
    """JSON schema of the files in configs/<kind>/."""
    schema = FILE_CLASSES[kind].model_json_schema()
    _clean_up(schema)
    definitions = schema.get("$defs", {})
    for name in _merged_sections(schema, definitions):
        definitions[name].pop("required", None)
    required = schema.pop("required", [])
    schema["properties"] = {"base": BASE_KEY, **schema["properties"]}
    schema["if"] = {"not": {"required": ["base"]}}
    schema["then"] = {"required": required}
    return {"$schema": DIALECT, **schema}


def _clean_up(schema: Schema) -> None:
    """Join the lines of descriptions, accept a section that fits several kinds (a file over a base
    may leave `kind` out), and refuse keys of a mapping that do not match their pattern.
    """
    if "description" in schema:
        paragraphs = inspect.cleandoc(schema["description"]).split("\n\n")
        schema["description"] = "\n\n".join(" ".join(text.split()) for text in paragraphs)
    if "oneOf" in schema:
        schema["anyOf"] = schema.pop("oneOf")
        schema.pop("discriminator", None)
    if "patternProperties" in schema:
        [(pattern, values)] = schema.pop("patternProperties").items()
        schema["propertyNames"] = {"pattern": pattern}
        schema["additionalProperties"] = values
    for _, inner in _inner_schemas(schema):
        _clean_up(inner)


def _merged_sections(schema: Schema, definitions: dict[str, Schema]) -> set[str]:
    """Names of the sections that are merged with those of a base: all but elements of lists."""
    merged: set[str] = set()
    waiting = [schema]
    while waiting:
        current = waiting.pop()
        name = current.get("$ref", "").rpartition("/")[2]
        if name and name not in merged:
            merged.add(name)
            waiting.append(definitions[name])
        waiting += [
            inner
            for keyword, inner in _inner_schemas(current)
            if keyword != "$defs" and keyword not in LIST_ELEMENTS
        ]
    return merged


def _inner_schemas(schema: Schema) -> Iterator[tuple[str, Schema]]:
    """(keyword, schema) of each schema directly inside this one."""
    for keyword in NAMED_SCHEMAS:
        for inner in schema.get(keyword, {}).values():
            yield keyword, inner
    for keyword in SCHEMA_LISTS:
        for inner in schema.get(keyword, []):
            yield keyword, inner
    for keyword in SCHEMAS:
        inner = schema.get(keyword)
        if isinstance(inner, dict):
            yield keyword, inner
