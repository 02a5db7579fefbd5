"""Fault injection: disturb encode, train, evaluate and launch, and compare with undisturbed runs.

    python -m tools.chaos --faults 1000 --json chaos.json
    python -m tools.chaos --series encode --seed 7 --only 42    # repeat one iteration
    python -m tools.chaos --merge a.json b.json                 # one table of several runs

Faults: SIGKILL and SIGTERM of one rank or all, SIGSTOP for a while or until the lease is lost, a
full disk, and errors, short transfers and interruptions of single calls (tools/faults/layer.c).  A
fault counts when it hits a running process.  After every iteration, published files must equal
those of an undisturbed run, the audit must pass, and no process and no temporary file may be left.
An error that ends a process must name the path and the reason.  The exit status is 1 after a
violation.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tools.faults.campaign import Campaign, Tally

FAULT_WEIGHTS = {
    "encode": 28,
    "train_local": 24,
    "train_spikes": 6,
    "train_fsdp2": 12,
    "train_zero2": 9,
    "train_zero3": 9,
    "evaluate": 15,
    "launch": 3,
}
"""Relative number of faults of each series; launch needs root, to start a SLURM cluster."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=1000, help="total number of faults")
    parser.add_argument(
        "--series", default=",".join(FAULT_WEIGHTS), help="names, separated by commas"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this iteration of the series only")
    parser.add_argument("--minutes", type=float, help="time limit")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        help="print one table of these --json results and exit",
    )
    args = parser.parse_args()
    if args.merge:
        print(table(merged(args.merge)))
        return 0
    names = args.series.split(",")
    if unknown := [name for name in names if name not in FAULT_WEIGHTS]:
        parser.error(f"--series {unknown}: choose from {','.join(FAULT_WEIGHTS)}")
    if args.keep is not None:
        args.keep.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        tallies = run(Campaign(args.keep or Path(folder), args.seed, log=log), names, args)
    print(table(tallies))
    if args.json is not None:
        results = {
            name: {**vars(tally), "violations": list(map(str, tally.violations))}
            for name, tally in tallies.items()
        }
        args.json.write_text(
            json.dumps({"seed": args.seed, "series": results}, indent=1, default=str) + "\n"
        )
    return int(any(tally.violations for tally in tallies.values()))


def run(campaign: Campaign, names: list[str], args: argparse.Namespace) -> dict[str, Tally]:
    """Run series in turn, each with its fraction of the faults and of the time limit."""
    tallies: dict[str, Tally] = {}
    started, total = time.monotonic(), sum(FAULT_WEIGHTS[name] for name in names)
    for number, name in enumerate(names):
        wanted = -(-args.faults * FAULT_WEIGHTS[name] // total)
        done = sum(FAULT_WEIGHTS[before] for before in names[: number + 1]) / total
        end = started + 60 * args.minutes * done if args.minutes else float("inf")

        def enough(tally: Tally, name: str = name, wanted: int = wanted, end: float = end) -> bool:
            made, now = tally.faults.total(), time.monotonic()
            rate = made / max(tally.seconds, 1e-9)
            left = min((wanted - made) / rate if rate else 0.0, end - now)
            if tally.iterations:
                log(
                    f"{name}: {made} of {wanted} faults, {tally.iterations} iterations, "
                    f"{len(tally.violations)} violations, {60 * rate:.0f} faults/min, "
                    f"{left / 60:.1f} min left"
                )
            return made >= wanted or now > end

        if name == "launch":
            from tools.faults.slurm import run_launch

            tallies[name] = run_launch(args.seed, enough, log)
        else:
            tallies[name] = campaign.run(name, enough, args.only)
    return tallies


def merged(files: list[Path]) -> dict[str, Tally]:
    """Tallies of several --json results, added up by series."""
    tallies: dict[str, Tally] = {}
    for file in files:
        for name, result in json.loads(file.read_text())["series"].items():
            tally = tallies.setdefault(name, Tally())
            tally.faults.update(result["faults"])
            for key in ("iterations", "starts", "recovered", "violations"):
                setattr(tally, key, getattr(tally, key) + result[key])
    return {name: tallies[name] for name in FAULT_WEIGHTS if name in tallies}


def table(tallies: dict[str, Tally]) -> str:
    """Markdown table of tallies."""
    kinds = sorted({kind for tally in tallies.values() for kind in tally.faults})
    head = ["series", "iterations", "starts", "faults", *kinds, "recovered", "violations"]
    rows = [head, ["---"] * len(head)]
    for name, tally in tallies.items():
        counts = [
            tally.iterations,
            tally.starts,
            tally.faults.total(),
            *(tally.faults[kind] for kind in kinds),
        ]
        rows.append([name, *map(str, counts), str(tally.recovered), str(len(tally.violations))])
    sums = [sum(int(row[column]) for row in rows[2:]) for column in range(1, len(head))]
    rows.append(["all", *map(str, sums)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
