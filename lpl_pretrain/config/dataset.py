"""Reads a data folder's `index.json`: written last by `encode`, read first by everything that uses
the folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lpl_pretrain.config.dataset_checks import index_problems
from lpl_pretrain.config.dataset_index import (
    FORMAT_VERSION,
    MAX_CLASSES,
    READABLE_VERSIONS,
    SINCE_VERSION_3,
    AutoencoderEntry,
    BucketEntry,
    DatasetIndex,
    FileEntry,
    LatentEntry,
    ShardEntry,
    TextEntry,
    changed_contents,
    contents_of,
    digest_of,
    fingerprint_of,
    shards_fingerprint_of,
)
from lpl_pretrain.config.paths import is_url
from lpl_pretrain.config.strict_json import JSONError, parse_json
from lpl_pretrain.errors import DataError

__all__ = [
    "FORMAT_VERSION",
    "INDEX_NAME",
    "MAX_CLASSES",
    "MIX_CYCLE_SAMPLES",
    "REMEDY",
    "SINCE_VERSION_3",
    "AutoencoderEntry",
    "BucketEntry",
    "DatasetIndex",
    "FileEntry",
    "LatentEntry",
    "ShardEntry",
    "TextEntry",
    "changed_contents",
    "contents_of",
    "digest_of",
    "fingerprint_of",
    "index_bytes",
    "parse_index",
    "read_bytes",
    "read_index",
    "sealed",
    "shards_fingerprint_of",
    "with_digest",
]

INDEX_NAME = "index.json"
MAX_INDEX_BYTES = 256 << 20
MIX_CYCLE_SAMPLES = 4096
"""Folders that are mixed by weight have their exact fractions in each run of this many samples
(data/mixture.py).
"""
REMEDY = "copy the file again from where it is whole, or encode the folder again"
"""Remedy for a corrupt or missing file of a data folder."""
PROBLEMS_SHOWN = 8
_WANTED = {
    "missing": "it is missing",
    "extra_forbidden": "it is no key of an index",
    "int": "wanted an integer",
    "float": "wanted a number",
    "string": "wanted a string",
    "bool": "wanted true or false",
    "list": "wanted a list",
    "dict": "wanted a mapping",
    "model": "wanted a mapping",
}
"""Start of pydantic's name for a problem -> text of the message."""


def read_index(folder: str | Path) -> DatasetIndex:
    """Index of a local folder or an fsspec URL.  Raises DataError if it is no finished data set."""
    path = f"{str(folder).rstrip('/')}/{INDEX_NAME}"
    missing = (
        f"{path}: not found; a folder without it is not a data set: run `lpl-pretrain "
        "encode` to its end"
    )
    return parse_index(read_bytes(path, MAX_INDEX_BYTES, missing), path)


def parse_index(raw: bytes, path: str) -> DatasetIndex:
    """`path` names the file in errors.  Raises DataError unless every field is there, is what was
    written, and makes sense.
    """
    try:
        fields = parse_json(raw, path)
    except JSONError as problem:
        raise DataError(f"{problem}: {REMEDY}") from None
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if type(version) is not int or version not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise DataError(
            f"{path}: format_version is {_shown(version)}, this version reads {readable}: encode "
            "the folder again"
        )
    _check_digest(fields, version, path)
    try:
        index = DatasetIndex.model_validate(fields, strict=True)
        problems = index_problems(index) or (_defaults(fields, index) if version >= 3 else [])
    except ValidationError as problem:
        problems = [_explain(error) for error in problem.errors(include_url=False)]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:PROBLEMS_SHOWN])
        raise DataError(f"{path}: does not describe a data set: encode the folder again{listed}")
    return index


def sealed(index: DatasetIndex) -> DatasetIndex:
    """`index` with the fingerprints and the digest that its other fields give."""
    shards = index.model_copy(update={"shards_fingerprint": shards_fingerprint_of(index.shards)})
    return with_digest(shards.model_copy(update={"fingerprint": fingerprint_of(shards)}))


def with_digest(index: DatasetIndex) -> DatasetIndex:
    return index.model_copy(update={"digest": digest_of(index.model_dump(mode="json"))})


def index_bytes(index: DatasetIndex) -> bytes:
    """Content of `index.json`, digest included."""
    return json.dumps(with_digest(index).model_dump(mode="json"), indent=2).encode() + b"\n"


def read_bytes(path: str, most_bytes: int, missing: str) -> bytes:
    """Content of a small file or URL.  Raises DataError, with `missing` if it is absent."""
    size = 0
    try:
        if is_url(path):
            import fsspec  # 0.1 s that a local folder need not pay

            with fsspec.open(path, "rb") as file:
                raw = file.read(most_bytes + 1)
        else:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                raw = b"" if size > most_bytes else file.read(most_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(missing) from None
    except Exception as problem:  # drivers behind fsspec raise errors of their own
        raise DataError(
            f"{path}: cannot be read ({type(problem).__name__}: {problem}): check the path or "
            "address, the permissions or credentials, and fsspec's driver"
        ) from None
    if max(size, len(raw)) > most_bytes:
        raise DataError(f"{path}: has more than {most_bytes} bytes, wanted at most that: {REMEDY}")
    return raw


def _check_digest(fields: dict[str, Any], version: int, path: str) -> None:
    if version < 3:
        if found := [name for name in SINCE_VERSION_3 if name in fields]:
            raise DataError(
                f"{path}: format_version is {version}, but {found[0]} belongs to a later one: "
                f"{REMEDY}"
            )
        return
    if absent := [name for name in SINCE_VERSION_3 if name not in fields]:
        raise DataError(f"{path}: {absent[0]} is missing: {REMEDY}")
    try:
        wanted = digest_of(fields)
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path}: not valid JSON ({problem}): {REMEDY}") from None
    if fields["digest"] != wanted:
        raise DataError(
            f"{path}: digest is {_shown(fields['digest'])}, its fields give {wanted!r}: a field "
            f"was changed: {REMEDY}"
        )


def _defaults(fields: dict[str, Any], index: DatasetIndex) -> list[str]:
    """Fields that are not there and would be read as their default: `encode` writes every one."""
    return [
        f"{key}: a field is missing"
        for key, value in index.model_dump(mode="json").items()
        if fields.get(key) != value
    ]


def _explain(error: Any) -> str:
    key, kind = ".".join(map(str, error["loc"])), error["type"]
    if kind == "literal_error":
        return f"{key}={_shown(error['input'])}: wanted {error['ctx']['expected']}"
    wanted = next(
        (text for start, text in _WANTED.items() if kind.startswith(start)), "wanted another value"
    )
    return (
        f"{key}: {wanted}"
        if kind in ("missing", "extra_forbidden")
        else f"{key}={_shown(error['input'])}: {wanted}"
    )


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
