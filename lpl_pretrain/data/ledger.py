"""Ledger of the stored samples that each update trained on: every rank appends to it while it
trains; an audit compares it with the order afterwards.

A line names the start of the run that it belongs to and the (sample index, folder, shard, row) of
each sample that was read for one update.  An update that is repeated after a restart is in the
ledger twice, and the later record counts.  About 25 bytes a sample.

A rollback after a spike (trainer/rollback.py) is a start too.  The line of a start has the number
of updates whose samples were jumped over until then, and that of a rollback its cause as well, so
that the number can be checked.
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
from lpl_pretrain.runtime.atomic import add_path_to_oserror

MAX_PROBLEMS = 20
"""Problems that an audit lists at most."""

Record = list[int]
"""[sample index, folder, shard, row]"""


class Ledger:
    """Writer of one rank's ledger."""

    def __init__(
        self,
        path: Path,
        start: str,
        first_step: int,
        jump_updates: int = 0,
        spike: tuple[int, int] | None = None,
    ) -> None:
        """`start`: identifier of this start of the run, the same on all ranks.

        `jump_updates`: updates whose samples were jumped over so far.  `spike`, for a rollback:
        (update that was rolled back, updates jumped over from it on).
        """
        line: dict[str, Any] = {"start": start, "step": first_step}
        if jump_updates:
            line["jump"] = jump_updates
        if spike is not None:
            line["spike"], line["skip_updates"] = spike
        self.path = path
        self.start = start
        with add_path_to_oserror(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            is_torn = path.is_file() and not path.read_bytes().endswith(b"\n")  # by a kill
            self.file = path.open("a", buffering=1)
            self.file.write("\n" * is_torn + json.dumps(line) + "\n")

    def write(self, step: int, batches: Sequence[LatentBatch]) -> None:
        """Appends the samples of `batches`, on which update number `step` (from 1) trains."""
        records = [
            [sample_index, *location]
            for batch in batches
            for sample_index, location in zip(
                batch.sample_indices.tolist(), batch.locations, strict=True
            )
        ]
        line = {"start": self.start, "step": step, "samples": records}
        with add_path_to_oserror(self.path):
            self.file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        with add_path_to_oserror(self.path):
            self.file.close()


@dataclass
class _Start:
    """The line of a start, and which updates followed it."""

    step: int
    jump: int
    spike: int | None
    skip_updates: int
    last: int = 0
    """Newest update after this start."""
    end: int | None = None
    """Updates above this one were repeated after a later start; None: there is no later start."""


@dataclass(frozen=True)
class Audit:
    """Summary of a run's ledger."""

    steps: int
    starts: int
    rollbacks: int
    """Starts that followed a spike."""
    repeated_updates: int
    """Updates that ran before a start and again after it."""
    jump_updates: int
    """Updates whose samples were jumped over."""
    substitutes: int
    """Samples that were read instead of unreadable ones."""
    min_reads: int
    """Smallest number of times that a sample of the data was read."""
    max_reads: int
    problems: list[str]


def audit(run_dir: RunDir, order: SampleOrder, global_batch_size: int) -> Audit:
    """Compares the samples of every update with those that `order` gives.

    Raises DataError if the run has no ledger.
    """
    files = sorted(run_dir.path.glob("logs/samples_rank_*.jsonl"))
    if not files:
        raise DataError(
            f"{run_dir.path}/logs: no samples_rank_*.jsonl: train with log.sample_indices=true"
        )
    starts = _read_starts(files[0])
    records, jumps, repeated = _read_updates(files, starts)
    problems = _jump_problems(list(starts.values()))
    reads: Counter[tuple[int, ...]] = Counter()
    substitutes = 0
    jump = 0
    for step in range(1, max(records, default=0) + 1):
        samples = records.get(step, [])
        jump = jumps.get(step, jump)
        problems += _update_problems(step, step - 1 + jump, samples, global_batch_size)
        locations = [tuple(location) for _, *location in samples]
        reads.update(locations)
        planned = order.locate([sample_index for sample_index, *_ in samples]).tuples()
        substitutes += sum(
            actual != wanted for actual, wanted in zip(locations, planned, strict=True)
        )
    num_samples = sum(pool.order.samples for pools in order.pools for pool in pools)
    return Audit(
        steps=len(records),
        starts=len(starts),
        rollbacks=sum(start.spike is not None for start in starts.values()),
        repeated_updates=repeated,
        jump_updates=jump,
        substitutes=substitutes,
        min_reads=min(reads.values(), default=0) if len(reads) == num_samples else 0,
        max_reads=max(reads.values(), default=0),
        problems=problems[:MAX_PROBLEMS],
    )


def _read_starts(path: Path) -> dict[str, _Start]:
    """Starts of the run by identifier, oldest first."""
    starts: dict[str, _Start] = {}
    for identifier, line in _read(path):
        if "start" in line and "samples" not in line:
            starts[identifier] = _Start(
                step=line["step"],
                jump=line.get("jump", 0),
                spike=line.get("spike"),
                skip_updates=line.get("skip_updates", 0),
            )
        elif "samples" in line and identifier in starts:
            starts[identifier].last = max(starts[identifier].last, line["step"])
    first_repeated: int | None = None
    for start in reversed(starts.values()):
        start.end = first_repeated
        first_repeated = start.step if first_repeated is None else min(first_repeated, start.step)
    return starts


def _read_updates(
    files: list[Path], starts: dict[str, _Start]
) -> tuple[dict[int, list[Record]], dict[int, int], int]:
    """(records of each update, jump_updates of each update, number of repeated updates); of a
    repeated update the latest records.

    Raises DataError for a start that is not in `starts`.
    """
    records: dict[int, list[Record]] = {}
    jumps: dict[int, int] = {}
    repeated: set[tuple[str, int]] = set()
    for path in files:
        for identifier, line in _read(path):
            if "samples" not in line:
                continue
            if identifier not in starts:
                raise DataError(
                    f"{path}: a start that {files[0].name} does not have: was that file removed?"
                )
            step = line["step"]
            end = starts[identifier].end
            if end is not None and step > end:
                repeated.add((identifier, step))
            else:
                records.setdefault(step, []).extend(line["samples"])
                jumps[step] = starts[identifier].jump
    return records, jumps, len(repeated)


def _jump_problems(starts: list[_Start]) -> list[str]:
    """Starts with a wrong number of jumped updates.

    A resumed start has the number of the update that it resumes from; a rollback jumps past the
    spike.
    """
    problems = []
    for number, start in enumerate(starts):
        earlier_starts = starts[:number]
        if start.spike is None:
            resumed = (s.jump for s in reversed(earlier_starts) if s.step < start.step)
            wanted = next(resumed, 0)
        else:
            jump_before = earlier_starts[-1].jump if earlier_starts else 0
            wanted = start.spike - 1 + jump_before + max(1, start.skip_updates) - start.step
            if earlier_starts and earlier_starts[-1].last != start.spike:
                problems.append(
                    f"rollback to step {start.step}: of update {start.spike}, but "
                    f"{earlier_starts[-1].last} was the last"
                )
        if start.jump != wanted:
            problems.append(
                f"start at step {start.step}: {start.jump} updates jumped over, wanted {wanted}"
            )
    return problems


def _update_problems(
    step: int, position: int, records: list[Record], global_batch_size: int
) -> list[str]:
    """Wrong sample indices among the records of update `step`, whose global batch is number
    `position` of the order.
    """
    reads = Counter(sample_index for sample_index, *_ in records)
    wanted = range(position * global_batch_size, (position + 1) * global_batch_size)
    wrong = {
        "missed": [sample_index for sample_index in wanted if sample_index not in reads],
        "read twice": [sample_index for sample_index, times in reads.items() if times > 1],
        "of another update": [sample_index for sample_index in reads if sample_index not in wanted],
    }
    return [
        f"update {step}: {len(indices)} samples {problem}, such as {indices[0]}"
        for problem, indices in wrong.items()
        if indices
    ]


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(start, line) of each complete line.

    A line names its start, because a rank that was suspended may write one after those of a later
    start.  Lines of older versions do not, and belong to the start above them.
    """
    identifier = ""
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # torn by a kill
        identifier = line.get("start", identifier)
        yield identifier, line
