"""Evaluation records, evaluations/step_*/<protocol>.json, read strictly: a damaged one is named and
never trusted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lpl_pretrain.config.steps import step_of
from lpl_pretrain.config.strict_json import JSONError, is_count, is_number, read_json, shown
from lpl_pretrain.errors import DataError

FORMAT_VERSION = 2
NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")
Record = dict[str, Any]
Warn = Callable[[str], object]


def read_record(path: Path) -> Record:
    """The record at evaluations/step_*/<protocol>.json.  Raises DataError.

    One of another format version is returned as it is: the caller says what becomes of it.
    """
    try:
        record = read_json(path)
    except JSONError as error:
        raise DataError(str(error)) from None
    if not isinstance(record, dict) or not is_count(record.get("format_version")):
        raise DataError(
            f"{path}: found {shown(record)}, wanted an evaluation record with a format_version"
        )
    if (
        record["format_version"] == FORMAT_VERSION
        and (problem := _record_problem(record, path)) is not None
    ):
        raise DataError(f"{path}: {problem}")
    return record


def read_records(evaluations: Path, protocol: str, warn: Warn) -> list[Record]:
    """All sound records of a protocol, ascending by step; calls `warn` for each of the others."""
    records = []
    for path in sorted(evaluations.glob(f"step_*/{protocol}.json")):
        try:
            records.append(read_record(path))
        except DataError as error:
            warn(f"{error}: this score does not count; evaluate that step again")
    found = [record for record in records if record["format_version"] == FORMAT_VERSION]
    return sorted(found, key=lambda record: record["step"])


def is_scored(path: Path) -> bool:
    """Whether a sound record lies there."""
    try:
        read_record(path)
    except DataError:
        return False
    return True


def _record_problem(record: Record, path: Path) -> str | None:
    """Reason why an object is not the record of this step and protocol; None: it is."""
    protocol, results = record.get("protocol"), record.get("results")
    if not is_count(record.get("step")) or record["step"] != step_of(path.parent.name):
        return f"step: found {shown(record.get('step'))}, the folder is called {path.parent.name}"
    if not isinstance(protocol, dict) or protocol.get("name") != path.stem:
        name = protocol.get("name") if isinstance(protocol, dict) else protocol
        return f"protocol.name: found {shown(name)}, the file is called {path.name}"
    if not isinstance(results, list) or not results:
        return f"results: found {shown(results)}, wanted at least one score"
    for number, entry in enumerate(results):
        if (problem := entry_problem(entry)) is not None:
            return f"results[{number}]: {problem}"
    return None


def entry_problem(entry: Any) -> str | None:
    """Problem with the keys that every score has, if any."""
    if not isinstance(entry, dict):
        return f"found {shown(entry)}, wanted an object"
    for key in ("metric", "weights"):
        if not (isinstance(entry.get(key), str) and NAME.fullmatch(entry[key])):
            return (
                f"{key}: found {shown(entry.get(key))}, wanted a name of letters, digits, '_', "
                "'-' and '.'"
            )
    for key in ("value", "guidance_scale"):
        if not is_number(entry.get(key)):
            return f"{key}: found {shown(entry.get(key))}, wanted a finite number"
    return None
