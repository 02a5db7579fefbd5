"""The shape of what a report reads: files of a run may be damaged, or come from elsewhere."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Optional

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

LARGEST_STEP, LARGEST_NUMBER = 10**12, 1e100
"""A chart cannot be drawn beyond."""
LONGEST_TEXT = 200
MOST_RESULTS, MOST_VALUES, MOST_SETTINGS, MOST_DEPTH = 2_000, 100_000, 5_000, 40


def _drawable(value: float) -> float:
    if math.isfinite(value) and abs(value) > LARGEST_NUMBER:
        raise ValueError(f"larger than {LARGEST_NUMBER:g}")
    return value


Number = Annotated[float, Field(strict=True), AfterValidator(_drawable)]
Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST_STEP)]
Text = Annotated[str, Field(strict=True, max_length=LONGEST_TEXT)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Score(_Part):
    metric: Text
    value: Number
    guidance_scale: Annotated[Number, Field(allow_inf_nan=False)]
    weights: Text = "ema"
    images: Count
    std: Optional[Number] = None
    low: Optional[Number] = None
    high: Optional[Number] = None
    at_half: Optional[Number] = None


class Sampler(_Part):
    kind: Text
    steps: Count


class Protocol(_Part):
    name: Text
    sampler: Optional[Sampler] = None
    best: Optional[Text] = None


class ExtractorFacts(_Part):
    dimension: Count = 0


class ReferenceFacts(_Part):
    pictures: Optional[Count] = None
    grid: Any = None


class Evaluation(_Part):
    step: Count
    results: Annotated[list[Score], Field(min_length=1, max_length=MOST_RESULTS)]
    protocol: Protocol
    samples: Any = None
    """As written: embed.py decides whether it is shown."""
    extractors: dict[str, ExtractorFacts] = {}
    reference: ReferenceFacts = ReferenceFacts()


def evaluation(raw: dict[str, Any]) -> dict[str, Any]:
    """A record as the report uses it, without keys that are null.  Raises ValueError that says what
    is wrong in one line.
    """
    try:
        found = Evaluation.model_validate(raw).model_dump(exclude_none=True)
    except ValidationError as problems:
        first = problems.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return {**found, "protocol": {**raw["protocol"], **found["protocol"]}}


def parse_json(text: str) -> Any:
    """Raises ValueError for what is not JSON, or nests too deeply."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # an escape that may be half of a pair
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nests too deeply") from None
    return bounded(value)


def parse_yaml(text: str) -> Any:
    """Plain data with text for keys, as JSON has it.  Raises ValueError for what is not YAML, or
    too large.
    """
    try:
        value = bounded(yaml.safe_load(text), MOST_SETTINGS)
        return json.loads(json.dumps(value, default=str, ensure_ascii=False).encode())
    except RecursionError:
        raise ValueError("nests too deeply") from None
    except (yaml.YAMLError, TypeError) as problem:
        raise ValueError(str(problem)) from None


def bounded(value: Any, most: int = MOST_VALUES) -> Any:
    """Return `value`.  Raises ValueError when it has more parts, aliases counted each time, or
    levels than a report takes.
    """
    level, parts = [value], 0
    for _ in range(MOST_DEPTH):
        parts += len(level)
        if parts > most:
            raise ValueError(f"holds more than {most:,} values")
        level = [child for each in level for child in _children(each)]
        if not level:
            return value
    raise ValueError(f"nests more than {MOST_DEPTH} levels")


def is_number(value: Any) -> bool:
    """Whether a chart can draw it, or leave it out as not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return not abs(value) > LARGEST_NUMBER or (isinstance(value, float) and math.isinf(value))


def is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_STEP


def _children(value: Any) -> list[Any]:
    return (
        list(value.values())
        if isinstance(value, dict)
        else list(value)
        if isinstance(value, (list, tuple, set))
        else []
    )
