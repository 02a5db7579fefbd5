"""A series of iterations: a job is started, disturbed and started again until it is complete, and
compared with one left alone.
"""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import fork_server
from tools.faults.attempt import Attempt, Ending
from tools.faults.layer import FileLayer
from tools.faults.plan import Fault, Trace, draw, generator
from tools.faults.processes import Ranks, orphans
from tools.faults.series import Series, all_series, prepare

Undisturbed = tuple[dict[str, bytes], dict[int, Trace], dict[int, float]]
"""(results, {ranks: calls that were made}, {ranks: seconds})."""
DISTURBED, CLEAN = 8, 3
"""Starts of one iteration that are disturbed at most; and undisturbed ones that may fail before it
is given up.
"""
OF_OTHERS = ("torchelastic_", "pymp-", "torchinductor_", "wandb-")
"""In names of temporaries of torch and wandb, which are not ours to remove."""
COLD_EVERY = 12
"""Of so many iterations one is started as a user does it: with all imports of its own, several
ranks by torchrun.
"""


@dataclass
class Violation:
    series: str
    iteration: int
    attempt: int
    what: str
    plan: list[Fault]
    replay: str

    def __str__(self) -> str:
        plan = "; ".join(map(str, self.plan)) or "nothing"
        return (
            f"{self.series} {self.iteration}.{self.attempt}: {self.what}\n    after {plan}\n    "
            f"replay: {self.replay}"
        )


@dataclass
class Tally:
    """What a series came to."""

    iterations: int = 0
    starts: int = 0
    recovered: int = 0
    """Iterations that ended like one left alone."""
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)
    seconds: float = 0.0


class Campaign:
    """`folder` is emptied by whoever made it.  `module`: what Python runs instead of lpl_pretrain."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        module: str = "lpl_pretrain",
        tell: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.seed, self.tell = folder, seed, tell
        self.files, self.inputs = folder / "files", folder / "files" / "inputs"
        prepare(self.inputs)
        self.layer = FileLayer(self.files, folder)
        start_server(self.layer)
        self.series = all_series(self.inputs, module)
        self._alone: dict[str, Undisturbed] = {}

    def running(self, module: str) -> Campaign:
        """The same campaign of another module's commands, which are compared with what this one's
        leave undisturbed.
        """
        other = copy.copy(self)
        other.series = all_series(self.inputs, module)
        return other

    def run(self, name: str, until: Callable[[Tally], bool], only: int | None = None) -> Tally:
        """Iterations of a series until there were enough of them."""
        tally, series, started = Tally(), self.series[name], time.monotonic()
        self.alone(name)
        iteration = 0 if only is None else only
        while not until(tally):
            self.iterate(series, iteration, tally)
            tally.seconds = time.monotonic() - started
            if only is not None:
                break
            iteration += 1
        return tally

    def alone(self, name: str) -> Undisturbed:
        """What a job does and leaves that nobody disturbs, on each of its numbers of ranks."""
        if name in self._alone:
            return self._alone[name]
        series, traces, seconds = self.series[name], {}, {}
        for need, made in NEEDS.get(name, {}).items():
            self.alone(need)
            if not (self.inputs / made).exists():
                shutil.copytree(self.files / need / "alone_1" / made, self.inputs / made)
        series.prepare()
        for count in series.ranks:
            folder = self.files / name / f"alone_{count}"
            series.begin(folder)
            ranks = self._ranks(series, folder, count)
            ranks.environment |= {"LPL_CHAOS_TRACE": "1"}
            attempt = Attempt(ranks, self.layer, [], 60.0, None)
            trace: list[tuple[int, str, str]] = []
            ending = attempt.run(lambda into=trace: into.extend(self.layer.trace()))
            trace[:] = [
                call
                for call in trace
                if not (call[1] == "stat" and f"{self.inputs}/autoencoder" in call[2])
            ]
            if not ending.well or not series.complete(folder):
                raise RuntimeError(f"{name} fails undisturbed: {ending.statuses} {ending.output}")
            traces[count], seconds[count] = trace, ending.seconds
        results = series.results(self.files / name / f"alone_{series.ranks[0]}")
        self._alone[name] = results, traces, seconds
        calls = sum(map(len, traces.values()))
        self.tell(
            f"{name}: {sum(seconds.values()):.1f} s undisturbed, {len(results)} files, "
            f"{calls} calls"
        )
        return self._alone[name]

    def iterate(self, series: Series, iteration: int, tally: Tally) -> None:
        results, traces, durations = self.alone(series.name)
        count = series.ranks[iteration % len(series.ranks)]
        seconds = durations[count]
        folder = self.files / series.name / f"{iteration:05d}"
        series.begin(folder)
        cold = iteration % COLD_EVERY == COLD_EVERY - 1
        before, plan, failed = len(tally.violations), list[Fault](), 0

        def violated(what: str) -> None:
            replay = (
                f"python -m tools.chaos --series {series.name} --seed {self.seed} --only "
                f"{iteration}"
            )
            tally.violations.append(Violation(series.name, iteration, attempt, what, plan, replay))
            self.tell(f"VIOLATION {tally.violations[-1]}")

        for attempt in itertools.count():
            rng = generator(self.seed, series.name, iteration, attempt)
            leased = series.lease(folder) is not None and not cold
            plan = draw(rng, traces[count], count, leased=leased) if attempt < DISTURBED else []
            ranks = self._ranks(series, folder, count, cold=cold and attempt % 3 == 0)
            ending = Attempt(
                ranks, self.layer, plan, seconds * (4 if ranks.cold else 1), series.lease(folder)
            ).run()
            tally.starts += 1
            tally.faults += ending.count()
            for what in ending.problems:
                violated(what)
            if left := orphans(ranks.mark):
                violated(f"processes are left: {left}")
            if not ending.happened and not (ending.well and series.complete(folder)):
                violated(f"does not recover: statuses {ending.statuses}: {tail(ending)}")
                failed += 1
            if ending.well and series.complete(folder):
                break
            if failed == CLEAN:
                violated("was given up")
                return
        if (
            series.temporaries(folder) and ending.happened
        ):  # removing them may have been refused: they wait for the next start
            Attempt(
                self._ranks(series, folder, count), self.layer, [], seconds, series.lease(folder)
            ).run()
            tally.starts += 1
        for what in self._compare(series, folder, results):
            violated(what)
        tally.iterations += 1
        if len(tally.violations) == before:
            tally.recovered += 1
            shutil.rmtree(folder)

    def _compare(self, series: Series, folder: Path, results: dict[str, bytes]) -> list[str]:
        found, problems = series.results(folder), series.problems(folder)
        different = sorted(
            name for name in found.keys() | results.keys() if found.get(name) != results.get(name)
        )
        if different:
            problems.append(
                f"{len(different)} files are not those of an undisturbed run: "
                f"{', '.join(different[:6])}"
            )
        if left := series.temporaries(folder):
            problems.append(f"temporaries are left: {', '.join(left[:6])}")
        scratch = sorted(path.name for path in (self.folder / "scratch").iterdir())
        if scratch := [name for name in scratch if not any(other in name for other in OF_OTHERS)]:
            problems.append(f"temporaries are left in TMPDIR: {', '.join(scratch[:6])}")
            shutil.rmtree(self.folder / "scratch")
        return problems

    def _ranks(self, series: Series, folder: Path, count: int, *, cold: bool = False) -> Ranks:
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        logs = self.folder / "logs" / series.name
        shutil.rmtree(logs, ignore_errors=True)
        torchrun = cold and count > 1
        environment = {"TMPDIR": str(scratch)}
        return Ranks(
            series.command(folder),
            count,
            environment,
            logs,
            f"{folder}/",
            cold,
            torchrun,
            series.meet,
        )


NEEDS = {
    **{f"train_{name}": {"encode": "latents"} for name in ("local", "fsdp2", "zero2", "zero3")},
    "evaluate": {"train_local": "run"},
}
"""Which inputs are made by which series."""


def start_server(layer: FileLayer) -> None:
    """Of warm processes: the file layer has to be loaded into it, for what is forked off it has no
    say in that any more.
    """
    before = os.environ.get("LD_PRELOAD")
    os.environ["LD_PRELOAD"] = str(layer.shared_object)
    try:
        fork_server.command_prefix.cache_clear()
        fork_server.command_prefix()
    finally:
        if before is None:
            del os.environ["LD_PRELOAD"]
        else:
            os.environ["LD_PRELOAD"] = before


def tail(ending: Ending) -> str:
    return " | ".join(f"{name}: {text.strip()[-600:]}" for name, text in ending.output.items())
