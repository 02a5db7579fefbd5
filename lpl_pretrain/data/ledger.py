"""Which stored samples every update was made of: written by each rank as it trains, and checked
afterwards against the order.

A line names its start and (global sample count, folder, shard, row) of what was read for one
update.  An update made again after a restart is in the files twice, and the later one counts.
About 25 bytes a sample.

A rollback after a spike (trainer/rollback.py) is a start too.  The line of a start says how many
updates' samples were jumped over until then, and a rollback's also why, so that the number can be
checked.
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
from lpl_pretrain.runtime.atomic import naming

MOST_TOLD = 20


class Ledger:
    """Of one rank.  `start` is a word that all ranks of this start have in common, and no other
    start has.
    """

    def __init__(
        self,
        path: Path,
        start: str,
        first_step: int,
        jump_updates: int = 0,
        spike: tuple[int, int] | None = None,
    ) -> None:
        """`spike`: (update that was rolled back, updates jumped over from it on)."""
        line: dict[str, Any] = {"start": start, "step": first_step}
        if jump_updates:
            line["jump"] = jump_updates
        if spike is not None:
            line["spike"], line["skip_updates"] = spike
        self.path, self.start = path, start
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = path.is_file() and not path.read_bytes().endswith(b"\n")  # by a kill
            self.file = path.open("a", buffering=1)
            self.file.write("\n" * torn + json.dumps(line) + "\n")

    def note(self, step: int, batches: Sequence[LatentBatch]) -> None:
        """Update number `step` (from 1) was made of these."""
        places = [
            [count, *place]
            for batch in batches
            for count, place in zip(batch.sample_indices.tolist(), batch.places, strict=True)
        ]
        with naming(self.path):
            self.file.write(
                json.dumps({"start": self.start, "step": step, "samples": places}) + "\n"
            )

    def close(self) -> None:
        with naming(self.path):
            self.file.close()


@dataclass
class _Start:
    """What the line of a start says, and what follows it."""

    step: int
    jump: int
    spike: int | None
    skip_updates: int
    last: int = 0
    """Newest update that was made after it."""
    end: int | None = None
    """The updates above this one were made again after a later start."""


@dataclass(frozen=True)
class Audit:
    steps: int
    starts: int
    rollbacks: int
    """Those of the starts that followed a spike."""
    made_again: int
    """Updates that were made before a start and again after it."""
    jump_updates: int
    """Updates whose samples were jumped over."""
    stand_ins: int
    """Samples that were read in the place of damaged ones."""
    least: int
    most: int
    """How often a sample was seen, of all in the data."""
    problems: list[str]


def audit(run_dir: RunDir, order: SampleOrder, global_batch_size: int) -> Audit:
    """Compares what was read for every update with what it should have been.  Raises DataError
    where nothing was written.
    """
    files = sorted(run_dir.path.glob("logs/samples_rank_*.jsonl"))
    if not files:
        raise DataError(
            f"{run_dir.path}/logs: no samples_rank_*.jsonl: train with log.samples=true"
        )
    starts = _starts(files[0])
    read: dict[int, list[list[int]]] = {}
    jump_of: dict[int, int] = {}
    made_again: set[tuple[str, int]] = set()
    for path in files:
        for start, line in _read(path):
            if "samples" not in line:
                continue
            if start not in starts:
                raise DataError(
                    f"{path}: a start that {files[0].name} does not have: was that file removed?"
                )
            step, end = line["step"], starts[start].end
            if end is not None and step > end:
                made_again.add((start, step))
            else:
                read.setdefault(step, []).extend(line["samples"])
                jump_of[step] = starts[start].jump
    seen: Counter[tuple[int, ...]] = Counter()
    problems, stand_ins, jump = _wrong_jumps(list(starts.values())), 0, 0
    for step in range(1, max(read, default=0) + 1):
        found, jump = read.get(step, []), jump_of.get(step, jump)
        problems += _wrong(step, step - 1 + jump, found, global_batch_size)
        seen.update(tuple(place) for _, *place in found)
        places = order.locate([count for count, *_ in found])
        wanted = zip(
            places.folder.tolist(), places.shard.tolist(), places.row.tolist(), strict=True
        )
        stand_ins += sum(
            tuple(place) != should for (_, *place), should in zip(found, wanted, strict=True)
        )
    samples = sum(pool.order.samples for pools in order.pools for pool in pools)
    least = min(seen.values(), default=0) if len(seen) == samples else 0
    return Audit(
        steps=len(read),
        starts=len(starts),
        rollbacks=sum(start.spike is not None for start in starts.values()),
        made_again=len(made_again),
        jump_updates=jump,
        stand_ins=stand_ins,
        least=least,
        most=max(seen.values(), default=0),
        problems=problems[:MOST_TOLD],
    )


def _starts(path: Path) -> dict[str, _Start]:
    """By name, in the order in which they were made."""
    found: dict[str, _Start] = {}
    for name, line in _read(path):
        if "start" in line and "samples" not in line:
            skip = line.get("skip_updates", 0)
            found[name] = _Start(line["step"], line.get("jump", 0), line.get("spike"), skip)
        elif "samples" in line and name in found:
            found[name].last = max(found[name].last, line["step"])
    later: int | None = None
    for start in reversed(found.values()):
        start.end = later
        later = start.step if later is None else min(later, start.step)
    return found


def _wrong_jumps(starts: list[_Start]) -> list[str]:
    """A resumed start jumps as far as the update it resumes from; a rollback, to behind the spike."""
    problems = []
    for number, start in enumerate(starts):
        before = starts[:number]
        if start.spike is None:
            held = (earlier.jump for earlier in reversed(before) if earlier.step < start.step)
            wanted = next(held, 0)
        else:
            there = before[-1].jump if before else 0
            wanted = start.spike - 1 + there + max(1, start.skip_updates) - start.step
            if before and before[-1].last != start.spike:
                last = before[-1].last
                problems.append(
                    f"rollback to step {start.step}: of update {start.spike}, but {last} "
                    "was the last"
                )
        if start.jump != wanted:
            what = f"{start.jump} updates jumped over, wanted {wanted}"
            problems.append(f"start at step {start.step}: {what}")
    return problems


def _wrong(step: int, position: int, found: list[list[int]], size: int) -> list[str]:
    """What is wrong with the samples `found` for update `step`, which is that of `position`."""
    counts = Counter(count for count, *_ in found)
    wanted = range(position * size, (position + 1) * size)
    missed = [count for count in wanted if count not in counts]
    twice = [count for count, times in counts.items() if times > 1]
    foreign = [count for count in counts if count not in wanted]
    told = {"missed": missed, "seen twice": twice, "of another update": foreign}
    return [
        f"update {step}: {len(counts)} samples {what}, such as {counts[0]}"
        for what, counts in told.items()
        if counts
    ]


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(start, line) of all whole lines.

    A line names its start, because a rank that was suspended may write one after those of a later
    start; older versions' did not.
    """
    start = ""
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # torn by a kill
        start = line.get("start", start)
        yield start, line
