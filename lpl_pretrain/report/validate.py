"""Validates what a report reads: files of a run may be damaged, or come from somewhere else."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Optional

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

MAX_STEP = 10**12
"""Largest step that a chart can draw."""
MAX_NUMBER = 1e100
"""Largest magnitude that a chart can draw."""
MAX_TEXT_LENGTH = 200
MAX_RESULTS = 2_000
"""Scores in one record."""
MAX_VALUES = 100_000
"""Values in one JSON document."""
MAX_SETTINGS = 5_000
"""Values in one configuration."""
MAX_DEPTH = 40
"""Levels of nesting."""


def _drawable(value: float) -> float:
    if math.isfinite(value) and abs(value) > MAX_NUMBER:
        raise ValueError(f"larger than {MAX_NUMBER:g}")
    return value


Number = Annotated[float, Field(strict=True), AfterValidator(_drawable)]
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_STEP)]
Text = Annotated[str, Field(strict=True, max_length=MAX_TEXT_LENGTH)]


class _Lenient(BaseModel):
    """Part of a record; keys that a report does not use are dropped."""

    model_config = ConfigDict(extra="ignore")


class Score(_Lenient):
    metric: Text
    value: Number
    guidance_scale: Annotated[Number, Field(allow_inf_nan=False)]
    weights: Text = "ema"
    images: Count
    std: Optional[Number] = None
    low: Optional[Number] = None
    high: Optional[Number] = None
    at_half: Optional[Number] = None


class Sampler(_Lenient):
    kind: Text
    steps: Count


class Protocol(_Lenient):
    name: Text
    sampler: Optional[Sampler] = None
    best: Optional[Text] = None


class ExtractorInfo(_Lenient):
    dimension: Count = 0


class ReferenceInfo(_Lenient):
    pictures: Optional[Count] = None
    grid: Any = None


class Evaluation(_Lenient):
    step: Count
    results: Annotated[list[Score], Field(min_length=1, max_length=MAX_RESULTS)]
    protocol: Protocol
    samples: Any = None
    """Path of the sample grid, unchecked: embed.py decides whether it is shown."""
    extractors: dict[str, ExtractorInfo] = {}
    reference: ReferenceInfo = ReferenceInfo()


def evaluation(raw: dict[str, Any]) -> dict[str, Any]:
    """Validate a record; returns what the report uses of it, without keys that are null.

    Raises ValueError with the first problem, in one line.
    """
    try:
        record = Evaluation.model_validate(raw).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return {**record, "protocol": {**raw["protocol"], **record["protocol"]}}


def parse_json(text: str) -> Any:
    """Parse JSON.  Raises ValueError for other text, and for too many values or levels."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # an escape that may be half of a pair
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nests too deeply") from None
    return bounded(value)


def parse_yaml(text: str) -> Any:
    """Parse YAML to plain data with text as keys, like JSON's.

    Raises ValueError for other text, and for too many values or levels.
    """
    try:
        value = bounded(yaml.safe_load(text), MAX_SETTINGS)
        return json.loads(json.dumps(value, default=str, ensure_ascii=False).encode())
    except RecursionError:
        raise ValueError("nests too deeply") from None
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(str(error)) from None


def bounded(value: Any, most: int = MAX_VALUES) -> Any:
    """Return `value`.  Raises ValueError for more than `most` values, or too many levels.

    An alias of YAML counts every time.
    """
    level = [value]
    count = 0
    for _ in range(MAX_DEPTH):
        count += len(level)
        if count > most:
            raise ValueError(f"holds more than {most:,} values")
        level = [child for each in level for child in _children(each)]
        if not level:
            return value
    raise ValueError(f"nests more than {MAX_DEPTH} levels")


def is_number(value: Any) -> bool:
    """Whether a chart can draw `value`, or leave it out as not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return not abs(value) > MAX_NUMBER or (isinstance(value, float) and math.isinf(value))


def is_step(value: Any) -> bool:
    """Whether `value` is an integer that a chart can draw as a step."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_STEP


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set)):
        return list(value)
    return []
