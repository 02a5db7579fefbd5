"""The logs of all ranks of a run's newest job as one stream."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from launch.status import job_states, single_job_folder

NAME = re.compile(r"_(\d+)_log\.(out|err)$")
POLL_S, SETTLE_S = 0.5, 2.0


def merged(run: Path, *, follow: bool) -> Iterator[str]:
    """`[rank] line`; with `follow` until the job is with the scheduler no more."""
    folder, read = single_job_folder(run), dict[Path, int]()
    job = str(folder.job)
    while True:
        found = list(news(folder.path, job, read))
        yield from found
        if not follow or (not found and not any(job_states([folder]))):
            return
        time.sleep(SETTLE_S if not found else POLL_S)


def news(folder: Path, job: str, read: dict[Path, int]) -> Iterator[str]:
    """Whole lines that were not read before; `read`: bytes of each file that were."""
    for path in sorted(folder.glob(f"{job}_*_log.*")):
        name = NAME.search(path.name)
        if name is None:
            continue
        with path.open("rb") as file:
            file.seek(read.get(path, 0))
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        read[path] = read.get(path, 0) + len(whole)
        yield from (f"[{name[1]}] {line}" for line in whole.decode(errors="replace").splitlines())
