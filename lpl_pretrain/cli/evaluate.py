"""`lpl-pretrain evaluate RUN PROTOCOL`: scores what is not scored yet, now or as checkpoints
arrive, and a small table.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Container
from datetime import timedelta
from typing import Any

from lpl_pretrain.config.evaluation import check_protocol
from lpl_pretrain.config.load import load_config, load_run_config
from lpl_pretrain.config.paths import expand
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import CheckpointError, ConfigError, is_transient
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trackers.build import build_trackers

PATIENCE = timedelta(hours=12)
"""The other ranks wait while the first one computes scores from all features."""


def run(
    run: str,
    protocol: str,
    overrides: list[str],
    step: int | None,
    pending: bool = False,
    watch: bool = False,
    poll_s: float = 30.0,
) -> None:
    """Runs `lpl-pretrain evaluate`; processes of torchrun divide the images of each score."""
    settings, run_dir, world = (
        load_config(EvaluateConfig, protocol, overrides),
        RunDir(expand(run)),
        World.from_environment(),
    )
    check_protocol(settings)
    if watch and step is not None:
        raise ConfigError(
            f"--watch with --step={step}: one step is scored at once; leave one of them out"
        )
    while watch and not run_dir.config.is_file():  # training has not begun
        time.sleep(poll_s)
    from lpl_pretrain.evaluation.evaluator import evaluate  # torch: not for --help
    from lpl_pretrain.runtime import dist
    from lpl_pretrain.runtime.log import log, set_up_logging

    device = dist.init(world, timeout=PATIENCE)
    set_up_logging(world.rank)
    records: list[dict[str, Any]] = []
    passed_over: dict[int, str] = {}
    trackers = []
    if world.rank == 0:
        trackers = build_trackers(run_dir, load_run_config(run_dir), training=False)
    while True:
        waiting = watch and not left(run_dir, settings.name, passed_over)
        if not dist.broadcast_json(waiting):
            steps = None if step is None else [step]
            for record in evaluate(
                run_dir, settings, device, steps, world, again=not pending, passed_over=passed_over
            ):
                records.append(record)
                for tracker in trackers:
                    tracker.score(record)
                if watch and world.rank == 0:
                    log.info("%s", one_line(record))
        if dist.broadcast_json(not watch or over(run_dir, settings.name, passed_over)):
            break
        time.sleep(poll_s)
    for tracker in trackers:
        tracker.close()
    damaged = [
        text
        for number, text in sorted(passed_over.items())
        if number in run_dir.complete_checkpoints()
    ]
    if damaged and not records:
        raise CheckpointError("nothing was scored:\n" + "\n".join(damaged))
    if world.rank == 0:
        unscored = (
            f"{run}: every complete checkpoint has its score by protocol {settings.name}, "
            "or is being scored; --step N scores again"
        )
        print("\n".join(table(records)) if records else unscored)
        print("\n".join(f"not scored: {text}" for text in damaged), end="\n" if damaged else "")
    again = any(
        is_transient(CheckpointError(text)) for text in damaged
    )  # the same command may score them
    if world.world_size > 1:
        dist.exit(int(again))
    if again:
        sys.exit(1)


def left(run_dir: RunDir, protocol: str, passed_over: Container[int]) -> list[int]:
    """Steps that are still to be scored; a damaged checkpoint is tried once."""
    return [step for step in run_dir.pending_evaluations(protocol) if step not in passed_over]


def over(run_dir: RunDir, protocol: str, passed_over: Container[int] = ()) -> bool:
    """Training has ended, and everything that it left is scored."""
    if not run_dir.config.is_file():
        return False
    complete = run_dir.complete_checkpoints()
    ended = bool(complete) and complete[-1] >= load_run_config(run_dir).steps
    return ended and not left(run_dir, protocol, passed_over)


def one_line(record: dict[str, Any]) -> str:
    found = (
        f"{r['metric']} {r['value']:.4g} (w={r['guidance_scale']:g}, {r['weights']})"
        for r in record["results"]
    )
    return f"step {record['step']:,}: {', '.join(found)}"


def table(records: list[dict[str, Any]]) -> list[str]:
    """Table of each metric: a line for each step, a column for each kind of weights and guidance
    scale, with standard errors.
    """
    lines: list[str] = []
    for metric in dict.fromkeys(
        entry["metric"] for record in records for entry in record["results"]
    ):
        first = [entry for entry in records[0]["results"] if entry["metric"] == metric]
        lines += [
            f"{metric}, {first[0]['images']} pictures",
            f"{'step':>10}" + "".join(f"{column(entry):>20}" for entry in first),
        ]
        for record in records:
            cells = [cell(entry) for entry in record["results"] if entry["metric"] == metric]
            lines.append(f"{record['step']:>10,}" + "".join(f"{text:>20}" for text in cells))
    return lines


def column(entry: dict[str, Any]) -> str:
    return f"{entry['weights']} w={entry['guidance_scale']:g}"


def cell(entry: dict[str, Any]) -> str:
    return f"{entry['value']:.4g}" + (f" ± {entry['std']:.2g}" if "std" in entry else "")
