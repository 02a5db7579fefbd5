"""Which stored samples every update was made of: written by each rank as it trains, and checked afterwards against the order.

A line names (global sample count, folder, shard, row) of what was read for one update.  An update made again after a restart
is in the files twice, and the later one counts.  About 25 bytes a sample.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.data.batch import LatentBatch
from lpl_pretrain.data.order import SampleOrder
from lpl_pretrain.errors import DataError
from lpl_pretrain.runtime.files import naming

MOST_TOLD = 20


class Ledger:
    """Of one rank.  `start` is a word that all ranks of this start have in common, and no other start has."""

    def __init__(self, path: Path, start: str, first_step: int) -> None:
        self.path = path
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = path.is_file() and not path.read_bytes().endswith(b"\n")  # by a kill
            self.file = path.open("a", buffering=1)
            self.file.write("\n" * torn + json.dumps({"start": start, "step": first_step}) + "\n")

    def note(self, step: int, batches: Sequence[LatentBatch]) -> None:
        """Update number `step` (from 1) was made of these."""
        places = [
            [count, *place] for batch in batches for count, place in zip(batch.sample_indices.tolist(), batch.places, strict=True)
        ]
        with naming(self.path):
            self.file.write(json.dumps({"step": step, "samples": places}) + "\n")

    def close(self) -> None:
        self.file.close()


@dataclass(frozen=True)
class Audit:
    steps: int
    starts: int
    made_again: int
    """Updates that were made before a restart and again after it."""
    stand_ins: int
    """Samples that were read in the place of damaged ones."""
    least: int
    most: int
    """How often a sample was seen, of all in the data."""
    problems: list[str]


def audit(run_dir: RunDir, order: SampleOrder, global_batch_size: int) -> Audit:
    """Compares what was read for every update with what it should have been.  Raises DataError where nothing was written."""
    files = sorted(run_dir.path.glob("logs/samples_rank_*.jsonl"))
    if not files:
        raise DataError(f"{run_dir.path}/logs: no samples_rank_*.jsonl: train with log.samples=true")
    firsts = {line["start"]: line["step"] for _, line in _read(files[0]) if "start" in line}
    starts = list(firsts)
    end_of = {start: min((firsts[later] for later in starts[i + 1 :]), default=None) for i, start in enumerate(starts)}
    read: dict[int, list[list[int]]] = {}
    made_again: set[tuple[str, int]] = set()
    for path in files:
        for start, line in _read(path):
            if "samples" not in line:
                continue
            if start not in firsts:
                raise DataError(f"{path}: a start that {files[0].name} does not have: was that file removed?")
            if (end := end_of[start]) is not None and line["step"] > end:
                made_again.add((start, line["step"]))
            else:
                read.setdefault(line["step"], []).extend(line["samples"])
    seen: Counter[tuple[int, ...]] = Counter()
    problems, stand_ins = [], 0
    for step in range(1, max(read, default=0) + 1):
        found, wrong = read.get(step, []), _wrong(step, read.get(step, []), global_batch_size)
        problems += wrong
        seen.update(tuple(place) for _, *place in found)
        places = order.locate([count for count, *_ in found])
        wanted = zip(places.folder.tolist(), places.shard.tolist(), places.row.tolist(), strict=True)
        stand_ins += sum(tuple(place) != should for (_, *place), should in zip(found, wanted, strict=True))
    samples = sum(pool.order.samples for pools in order.pools for pool in pools)
    least = min(seen.values(), default=0) if len(seen) == samples else 0
    return Audit(len(read), len(starts), len(made_again), stand_ins, least, max(seen.values(), default=0), problems[:MOST_TOLD])


def _wrong(step: int, found: list[list[int]], size: int) -> list[str]:
    counts, wanted = Counter(count for count, *_ in found), range((step - 1) * size, step * size)
    missed = [count for count in wanted if count not in counts]
    twice = [count for count, times in counts.items() if times > 1]
    foreign = [count for count in counts if count not in wanted]
    told = {"missed": missed, "seen twice": twice, "of another update": foreign}
    return [f"update {step}: {len(counts)} samples {what}, such as {counts[0]}" for what, counts in told.items() if counts]


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(start, line) of all whole lines."""
    start = ""
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # torn by a kill
        start = line.get("start", start)
        yield start, line
