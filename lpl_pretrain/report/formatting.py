"""Formats numbers, durations and times for a page, and picks evenly spaced items."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from typing import Any, TypeVar

Item = TypeVar("Item")


def evenly_spaced(items: list[Item], count: int) -> list[Item]:
    """Pick at most `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def number(value: float | None) -> str:
    """Three or four digits: 96,000; 1.73M; 212; 0.0412; a dash for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return "–"
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Hours and minutes, or seconds below a minute: 2 h 05 min; 8 min; 12 s."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min" if seconds >= 60 else f"{seconds:.0f} s"


def utc_time(timestamp: Any) -> str:
    """Date and time in UTC of a datetime or of seconds since 1970; "" for anything else."""
    try:
        moment = timestamp
        if not isinstance(timestamp, datetime):
            moment = datetime.fromtimestamp(timestamp, timezone.utc)
    except (TypeError, ValueError, OverflowError, OSError):
        return ""
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
