"""Iterations of a series: restart a disturbed job until it is complete, then check its results."""

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
from tools.faults.attempt import Attempt, AttemptResult
from tools.faults.layer import FileLayer
from tools.faults.plan import Fault, Trace, draw, generator
from tools.faults.processes import Ranks, orphans
from tools.faults.series import Series, all_series, prepare

Undisturbed = tuple[dict[str, bytes], dict[int, Trace], dict[int, float]]
"""(results, {ranks: file calls made}, {ranks: seconds}) of undisturbed starts."""
MAX_DISTURBED = 8
"""Starts of one iteration with faults."""
MAX_FAILED = 3
"""Failed starts without faults after which an iteration is given up."""
FOREIGN_TEMPORARIES = ("torchelastic_", "pymp-", "torchinductor_", "wandb-")
"""Parts of names of torch's and wandb's temporary files."""
COLD_EVERY = 12
"""Every twelfth iteration starts without the fork server, several ranks by torchrun."""


@dataclass
class Violation:
    """A check that failed, after which faults, and the command that repeats it."""

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
    """Counts and violations of one series."""

    iterations: int = 0
    starts: int = 0
    recovered: int = 0
    """Iterations whose results equal those of an undisturbed run."""
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)
    seconds: float = 0.0


class Campaign:
    """Runs series of disturbed jobs in `folder`, which the caller deletes.

    `module` is what `python -m` runs, lpl_pretrain or a broken variant of it.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        module: str = "lpl_pretrain",
        log: Callable[[str], None] = print,
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.log = log
        self.files = folder / "files"
        self.inputs = self.files / "inputs"
        prepare(self.inputs)
        self.layer = FileLayer(self.files, folder)
        start_server(self.layer)
        self.series = all_series(self.inputs, module)
        self._undisturbed: dict[str, Undisturbed] = {}

    def running(self, module: str) -> Campaign:
        """Copy that runs another module and compares with this campaign's undisturbed results."""
        other = copy.copy(self)
        other.series = all_series(self.inputs, module)
        return other

    def run(self, name: str, until: Callable[[Tally], bool], only: int | None = None) -> Tally:
        """Run iterations of a series until `until(tally)`; `only` runs that one alone."""
        tally, series, started = Tally(), self.series[name], time.monotonic()
        self.undisturbed(name)
        iteration = 0 if only is None else only
        while not until(tally):
            self.iterate(series, iteration, tally)
            tally.seconds = time.monotonic() - started
            if only is not None:
                break
            iteration += 1
        return tally

    def undisturbed(self, name: str) -> Undisturbed:
        """Results, file calls and seconds of undisturbed starts, once for each number of ranks."""
        if name in self._undisturbed:
            return self._undisturbed[name]
        series, traces, seconds = self.series[name], {}, {}
        for other, output in NEEDS.get(name, {}).items():
            self.undisturbed(other)
            if not (self.inputs / output).exists():
                shutil.copytree(self.files / other / "undisturbed_1" / output, self.inputs / output)
        series.prepare()
        for count in series.ranks:
            folder = self.files / name / f"undisturbed_{count}"
            series.begin(folder)
            ranks = self._ranks(series, folder, count)
            ranks.environment |= {"LPL_CHAOS_TRACE": "1"}
            attempt = Attempt(ranks, self.layer, [], 60.0, None)
            trace: list[tuple[int, str, str]] = []
            result = attempt.run(lambda into=trace: into.extend(self.layer.trace()))
            trace[:] = [
                call
                for call in trace
                if not (call[1] == "stat" and f"{self.inputs}/autoencoder" in call[2])
            ]
            if not result.succeeded or not series.complete(folder):
                raise RuntimeError(f"{name} fails undisturbed: {result.statuses} {result.output}")
            traces[count], seconds[count] = trace, result.seconds
        results = series.results(self.files / name / f"undisturbed_{series.ranks[0]}")
        self._undisturbed[name] = results, traces, seconds
        calls = sum(map(len, traces.values()))
        self.log(
            f"{name}: {sum(seconds.values()):.1f} s undisturbed, {len(results)} files, "
            f"{calls} calls"
        )
        return self._undisturbed[name]

    def iterate(self, series: Series, iteration: int, tally: Tally) -> None:
        """Run one iteration and add its faults and violations to `tally`."""
        results, traces, durations = self.undisturbed(series.name)
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
            self.log(f"VIOLATION {tally.violations[-1]}")

        for attempt in itertools.count():
            rng = generator(self.seed, series.name, iteration, attempt)
            leased = series.lease(folder) is not None and not cold
            plan = draw(rng, traces[count], count, leased=leased) if attempt < MAX_DISTURBED else []
            ranks = self._ranks(series, folder, count, cold=cold and attempt % 3 == 0)
            result = Attempt(
                ranks, self.layer, plan, seconds * (4 if ranks.cold else 1), series.lease(folder)
            ).run()
            tally.starts += 1
            tally.faults += result.count()
            for what in result.problems:
                violated(what)
            if left := orphans(ranks.mark):
                violated(f"processes are left: {left}")
            if not result.happened and not (result.succeeded and series.complete(folder)):
                violated(f"does not recover: statuses {result.statuses}: {tail(result)}")
                failed += 1
            if result.succeeded and series.complete(folder):
                break
            if failed == MAX_FAILED:
                violated("was given up")
                return
        # a fault may have prevented the removal of temporaries, which the next start repeats
        if series.temporaries(folder) and result.happened:
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
        actual = series.results(folder)
        problems = series.problems(folder)
        different = sorted(
            name for name in actual.keys() | results.keys() if actual.get(name) != results.get(name)
        )
        if different:
            problems.append(
                f"{len(different)} files differ from an undisturbed run: {', '.join(different[:6])}"
            )
        if left := series.temporaries(folder):
            problems.append(f"temporaries are left: {', '.join(left[:6])}")
        scratch = sorted(path.name for path in (self.folder / "scratch").iterdir())
        if scratch := [
            name for name in scratch if not any(other in name for other in FOREIGN_TEMPORARIES)
        ]:
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
            series.communicate,
        )


NEEDS = {
    **{f"train_{name}": {"encode": "latents"} for name in ("local", "fsdp2", "zero2", "zero3")},
    "evaluate": {"train_local": "run"},
}
"""Inputs of a series that another series writes: {series: {other series: its output}}."""


def start_server(layer: FileLayer) -> None:
    """Start a fork server that has loaded the file layer: LD_PRELOAD has no effect after a fork."""
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


def tail(result: AttemptResult) -> str:
    return " | ".join(f"{name}: {text.strip()[-600:]}" for name, text in result.output.items())
