"""Interface of an experiment tracker, where metrics, events and scores of a run are shown."""

from __future__ import annotations

from typing import Any, Protocol


class Tracker(Protocol):
    """One destination.  Called on rank 0 alone, in the order of the run.

    A step may come twice after a restart; the later one counts.
    """

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Metrics of a log step, by name as in docs/glossary.md."""

    def event(self, name: str, step: int, details: dict[str, Any]) -> None:
        """Something rare, such as `resumed`, `spike` or `update_left_out`."""

    def score(self, record: dict[str, Any]) -> None:
        """Record of one evaluation, which may come late and out of order."""

    def close(self) -> None:
        """Write what is buffered."""


def score_values(record: dict[str, Any]) -> dict[str, float]:
    """Scores of an evaluation's record by name: evaluation/PROTOCOL/METRIC/WEIGHTS_wSCALE."""
    protocol = record["protocol"]["name"]
    return {
        f"evaluation/{protocol}/{entry['metric']}/"
        f"{entry['weights']}_w{entry['guidance_scale']:g}": entry["value"]
        for entry in record["results"]
    }
