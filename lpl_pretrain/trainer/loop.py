"""The training loop: resume, update, average, log, save, stop when asked.

Steps are counted as updates applied or skipped: after the first one `step` is 1.  A checkpoint
named after a step holds the state after that many updates.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.data.ledger import Ledger
from lpl_pretrain.losses.term import LossTerm
from lpl_pretrain.runtime.atomic import atomic_write
from lpl_pretrain.runtime.device import peak_memory
from lpl_pretrain.runtime.dist import AgreedFlags, broadcast_json
from lpl_pretrain.runtime.log import log, progress
from lpl_pretrain.runtime.preempt import StopRequest
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.runtime.watchdog import Watchdog
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trackers.build import Trackers
from lpl_pretrain.trainer.assemble import Run, assemble
from lpl_pretrain.trainer.lr import learning_rate
from lpl_pretrain.trainer.metrics import Meter
from lpl_pretrain.trainer.resume import restore
from lpl_pretrain.trainer.rollback import Start, recover
from lpl_pretrain.trainer.stragglers import Stragglers
from lpl_pretrain.trainer.update import UpdateResult

Score = Callable[[], Iterable[dict[str, Any]]]
"""Collective. Scores checkpoints that are published and not scored yet; yields records."""


def train(
    config: TrainConfig,
    run_dir: RunDir,
    world: World,
    device: torch.device,
    stop: StopRequest,
    score: Score | None = None,
    check_ownership: Callable[[], None] = lambda: None,
    begin: Callable[[int], None] = lambda first_step: None,
) -> bool:
    """Collective. Train until `config.steps` or until a rank is asked to stop; True when the run is
    complete.

    `score` is called after every published checkpoint, and training waits for it.
    `check_ownership` exits the process if the run's lease was taken over; it is called before every
    shared write.  `begin(first_step)` is called before the first update.
    """
    run = assemble(config, run_dir, world, device, check_ownership)
    trackers = Trackers(run_dir, config, world.rank, check_ownership)
    watchdog = Watchdog(config.watchdog, world.stacks_file() or run_dir.stacks(world.rank))
    flags = AgreedFlags(2)
    try:
        start = Start(restore(run, trackers))
        begin(start.step)
        while isinstance(ended := loop(run, trackers, watchdog, start, stop, flags, score), Start):
            start = ended
        return ended
    finally:
        watchdog.close()
        trackers.close()


def loop(
    run: Run,
    trackers: Trackers,
    watchdog: Watchdog,
    start: Start,
    stop: StopRequest,
    flags: AgreedFlags,
    score: Score | None,
) -> bool | Start:
    """Collective. Run updates; True: all steps done, False: stopped, Start: rolled back."""
    config = run.config
    meter = Meter(run.device)
    clock = Clock(run.device)
    dtype = run.strategy.precision.autocast or run.strategy.precision.master
    stragglers = Stragglers(run.world, run.device, dtype, trackers)
    batches = run.batches(start.step)
    ledger = open_ledger(run, start) if config.log.sample_indices else None
    bar = progress(config.steps, "step", config.name, initial=start.step, shown=run.world.rank == 0)
    logged = scored = start.step
    try:
        for step in range(start.step, config.steps):
            completed = step + 1
            with clock.host("data"):
                microbatches = list(islice(batches, run.grad_accum_steps))
            with clock.host("update"):
                result = run.updater.update(step, microbatches, meter, clock)
                with clock.device("ema"):
                    run.ema.update(completed)
            if ledger is not None:
                ledger.write(completed, [batch.latents for batch in microbatches])
            log_calibrated(trackers, completed, result)
            if result.spike is not None:
                log_skipped(run, trackers)
                with watchdog.paused():
                    restart = recover(run, trackers, result.spike)
                if restart is not None:
                    return restart
            stopping, writing = flags.read(bool(stop), run.checkpoints.busy)
            last = stopping or completed == config.steps
            if last or completed % config.log.every_steps == 0 or is_save_due(config, completed):
                log_skipped(run, trackers)
            if completed % config.log.every_steps == 0 or completed == config.steps:
                means = meter.flush()
                seconds = clock.flush()
                steps = range(logged, completed)
                metrics = {
                    **means_of_terms(means),
                    **step_metrics(run, step, result),
                    **throughput_metrics(run, steps, seconds),
                    **stragglers.update(completed, seconds, len(steps)),
                }
                trackers.metrics(completed, metrics)
                logged = completed
                if means:
                    bar.set_postfix({"loss": f"{means['loss/total']:.4f}"}, refresh=False)
            stop.finishes_step = True  # from here on Ctrl-C waits for the end of a step
            with clock.host("checkpoint"):
                if not writing:
                    run.checkpoints.advance()
                save(run, completed, last=last)
            if score is not None and run.checkpoints.published > scored and not stopping:
                with clock.host("evaluation"), watchdog.paused():
                    trackers.scores(score())
                scored = run.checkpoints.published
            watchdog.step_done()
            bar.update(1)
            if stopping and completed < config.steps:
                bar.close()  # its last line comes before the message
                log_stop(run, trackers, stop, completed)
                return False
            if not last:
                flags.post(bool(stop), run.checkpoints.busy)
        return True
    finally:
        batches.close()
        bar.close()


def open_ledger(run: Run, start: Start) -> Ledger:
    """Collective. Open this rank's ledger; the name of the start is the same on all ranks."""
    path = run.run_dir.ledger(run.world.rank)
    name = broadcast_json(secrets.token_hex(4))
    if start.spike is None:
        return Ledger(path, name, start.step, jump_updates=run.jump_updates)
    skip = run.config.optimizer.spike.skip_updates
    return Ledger(path, name, start.step, run.jump_updates, spike=(start.spike.step, skip))


def is_save_due(config: TrainConfig, completed: int) -> bool:
    """Whether the configuration asks for a checkpoint or a snapshot after this step."""
    snapshot_every = config.ema.snapshot_every_steps
    return completed % config.checkpoint.every_steps == 0 or bool(
        snapshot_every and completed % snapshot_every == 0
    )


def save(run: Run, completed: int, *, last: bool) -> None:
    """Collective. Save what is due after this step; `last`: wait until it is published."""
    config = run.config
    seen = run.samples_seen(completed)
    if config.ema.snapshot_every_steps and completed % config.ema.snapshot_every_steps == 0:
        state = run.state(completed)
        run.checkpoints.save_snapshot(completed, run.strategy, run.ema, state, samples_seen=seen)
    if last or completed % config.checkpoint.every_steps == 0:
        state = run.state(completed)
        run.checkpoints.save(completed, run.strategy, run.ema, state, samples_seen=seen)
        if run.world.rank == 0:
            for term in run.updater.terms:
                save_panels(term, run.run_dir.panels(term.name, completed))
    if last:
        run.checkpoints.finish()


def save_panels(term: LossTerm, path: Path) -> None:
    """Write the panels of a loss term as PNG, if it has something to show.  Not collective."""
    image = term.panels()
    if image is not None:
        with atomic_write(path) as temporary:
            image.save(temporary, format="PNG", optimize=True)


def log_skipped(run: Run, trackers: Trackers) -> None:
    """Collective. Log the updates that were skipped since the last call; waits for the device."""
    for skipped in run.updater.skipped_updates():
        trackers.event("update_left_out", skipped.step, reason=skipped.reason)


def log_calibrated(trackers: Trackers, completed: int, result: UpdateResult) -> None:
    for name, weight in result.calibrated.items():
        trackers.event(f"{name}_weight_calibrated", completed, weight=weight)


def log_stop(run: Run, trackers: Trackers, stop: StopRequest, completed: int) -> None:
    signal = stop.signal_name or "signal to another rank"
    trackers.event("stopped", completed, signal=signal)
    log.info(
        "%s: stopped after step %d of %d; %s",
        signal,
        completed,
        run.config.steps,
        stop.resume_hint,
    )


def means_of_terms(means: dict[str, float]) -> dict[str, float]:
    """Replace `weighted/TERM` of each term by its fraction of the total loss."""
    metrics = {name: mean for name, mean in means.items() if not name.startswith("weighted/")}
    for name, mean in means.items():
        term = name.removeprefix("weighted/")
        if term != name:
            metrics[f"{term}/weighted_share"] = mean / means["loss/total"]
    return metrics


def step_metrics(run: Run, step: int, result: UpdateResult) -> dict[str, float]:
    """Settings in force in update number `step` (from 0); waits for the device."""
    values = {
        "lr": learning_rate(run.config.optimizer, step, run.config.steps),
        "samples_seen": run.samples_seen(step + 1),
    }
    grad_norm = result.grad_norm.item()
    if grad_norm == grad_norm:
        values["grad_norm"] = grad_norm
    if run.jump_updates:
        values["jump_updates"] = run.jump_updates
    if run.updater.nonfinite.skipped_updates:
        values["skipped_updates"] = run.updater.nonfinite.skipped_updates
    if run.strategy.loss_scale.dynamic:
        values["loss_scale"] = run.strategy.loss_scale.value
    if lost := run.stream.bad_samples.num_samples():
        values["data/skipped_samples"] = lost
    for term in run.updater.terms[1:]:
        if term.active(step):
            values[f"{term.name}/weight"] = term.weight(step)
    return values


def throughput_metrics(run: Run, steps: range, seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of each update by phase, samples a second and FLOP/s of one device, over the updates
    `steps`.
    """
    samples = len(steps) * run.config.batch.global_batch_size
    return {
        **peak_memory(run.device),
        "samples_per_s": samples / seconds["all"],
        **run.flops.throughput(seconds["all"], steps),
        **{f"seconds/{name}": total / len(steps) for name, total in seconds.items()},
    }
