"""The training loop: resume, update, average, log, save, stop when asked, in words.

Steps are counted as updates applied: after the first update `step` is 1.  A checkpoint named after
a step holds the state after that many updates.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.data.ledger import Ledger
from lpl_pretrain.runtime.device import peak_memory
from lpl_pretrain.runtime.dist import any_over_ranks, broadcast_json
from lpl_pretrain.runtime.log import log, progress
from lpl_pretrain.runtime.preempt import StopRequest
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.runtime.watchdog import Watchdog
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import Run, assemble
from lpl_pretrain.trainer.lpl_panels import save_lpl_panels
from lpl_pretrain.trainer.lr import learning_rate
from lpl_pretrain.trainer.metrics import Meter
from lpl_pretrain.trainer.resume import restore
from lpl_pretrain.trainer.rollback import Start, recover
from lpl_pretrain.trainer.step import UpdateResult
from lpl_pretrain.trainer.stragglers import Stragglers
from lpl_pretrain.trainer.trackers import Trackers

Score = Callable[[], Iterable[dict[str, Any]]]
"""Collective. Scores what is published and not scored; yields records."""


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
    """Collective. Trains until `config.steps` or until a rank is asked to stop; True when the run
    is complete.

    `score` is called after every published checkpoint, and training waits for it.  `check_ownership` does not
    return where the run is another process's by now; it is called before writing to what the two
    would share.  `begin` is called when steps begin.
    """
    run = assemble(config, run_dir, world, device, check_ownership)
    sinks = Trackers(run_dir, config, world.rank, check_ownership)
    watchdog = Watchdog(config.watchdog, world.stacks_file() or run_dir.stacks(world.rank))
    try:
        start = Start(restore(run, sinks))
        begin(start.step)
        while isinstance(ended := loop(run, sinks, watchdog, start, stop, score), Start):
            start = ended
        return ended
    finally:
        watchdog.close()
        sinks.close()


def loop(
    run: Run,
    sinks: Trackers,
    watchdog: Watchdog,
    start: Start,
    stop: StopRequest,
    score: Score | None,
) -> bool | Start:
    """Collective. The loop itself: whether all steps are done, or where to start after a rollback."""
    first_step = logged = start.step
    config, meter, clock = run.config, Meter(run.device), Clock(run.device)
    stragglers = Stragglers(
        run.world,
        run.device,
        run.strategy.precision.autocast or run.strategy.precision.master,
        sinks,
    )
    batches = run.stream.prefetch(run.requests(first_step), run.device)
    ledger = open_ledger(run, start) if config.log.sample_indices else None
    scored = first_step
    bar = (
        progress(config.steps, "step", config.name, initial=first_step)
        if run.world.rank == 0
        else None
    )
    for step in range(first_step, config.steps):
        done = step + 1
        with clock.host("data"):
            microbatches = list(islice(batches, run.grad_accum_steps))
        with clock.host("update"):
            outcome = run.updater.update(step, run.hands(step), microbatches, meter, clock)
            with clock.device("ema"):
                run.ema.update(done)
        if ledger is not None:
            ledger.write(done, microbatches)
        tell(run, sinks, done, outcome)
        if outcome.spike is not None:
            with watchdog.paused():
                again = recover(run, sinks, outcome.spike)
            if again is not None:
                batches.close()
                if bar is not None:
                    bar.close()
                return again
        if done % config.log.every_steps == 0 or done == config.steps:
            means, seconds = meter.flush(), clock.flush()
            ranks = stragglers.look(done, seconds, done - logged)
            sinks.metrics(
                done,
                {
                    **means,
                    **settings(run, step, means, outcome),
                    **speed(run, logged, done, seconds),
                    **ranks,
                },
            )
            logged = done
            if bar is not None and means:
                bar.set_postfix({"loss": f"{means['loss/total']:.4f}"}, refresh=False)
        stopping, writing = any_over_ranks(bool(stop), run.checkpoints.busy)
        stop.finishes_step = True  # from here on Ctrl-C waits for it
        with clock.host("checkpoint"):
            if not writing:
                run.checkpoints.advance()
            save(run, done, last=stopping or done == config.steps)
        if score is not None and run.checkpoints.published > scored and not stopping:
            with clock.host("evaluation"), watchdog.paused():
                sinks.scores(score())
            scored = run.checkpoints.published
        watchdog.step_done()
        if bar is not None:
            bar.update(1)
        if stopping and done < config.steps:
            batches.close()
            if bar is not None:
                bar.close()
            signal = stop.signal_name or "signal to another rank"
            sinks.event("stopped", done, signal=signal)
            log.info(
                "%s: stopped after step %d of %d; %s", signal, done, config.steps, stop.resume_hint
            )
            return False
    if bar is not None:
        bar.close()
    return True


def open_ledger(run: Run, start: Start) -> Ledger:
    """Communicates: a start has one name on all ranks."""
    path, name = run.run_dir.ledger(run.world.rank), broadcast_json(secrets.token_hex(4))
    if start.spike is None:
        return Ledger(path, name, start.step, jump_updates=run.jump_updates)
    skip = run.config.optimizer.spike.skip_updates
    return Ledger(path, name, start.step, run.jump_updates, spike=(start.spike.step, skip))


def save(run: Run, done: int, *, last: bool) -> None:
    """Collective. What is due after this step; `last`: nothing comes after it, so wait until it is
    published.
    """
    config, seen = run.config, run.samples_seen(done)
    if config.ema.snapshot_every_steps and done % config.ema.snapshot_every_steps == 0:
        run.checkpoints.save_snapshot(
            done, run.strategy, run.ema, run.state(done), samples_seen=seen
        )
    if last or done % config.checkpoint.every_steps == 0:
        run.checkpoints.save(done, run.strategy, run.ema, run.state(done), samples_seen=seen)
        if run.world.rank == 0 and run.updater.perceptual is not None:
            save_lpl_panels(
                config, run.updater.perceptual, run.updater.scaling, run.run_dir.lpl_picture(done)
            )
    if last:
        run.checkpoints.finish()


def tell(run: Run, sinks: Trackers, done: int, outcome: UpdateResult) -> None:
    """What happened in an update and does not happen in most."""
    if outcome.left_out is not None:
        sinks.event("update_left_out", done, reason=outcome.left_out)
    if outcome.weight_frozen and run.updater.perceptual is not None:
        sinks.event("lpl_weight_calibrated", done, weight=run.updater.perceptual.weight.frozen)


def settings(
    run: Run, step: int, means: dict[str, float], outcome: UpdateResult
) -> dict[str, float]:
    """What was in force in update number `step` (from 0), beside what was measured."""
    values = {
        "lr": learning_rate(run.config.optimizer, step, run.config.steps),
        "samples_seen": run.samples_seen(step + 1),
    }
    if outcome.left_out is None:
        values["grad_norm"] = outcome.grad_norm
    if run.jump_updates:
        values["jump_updates"] = run.jump_updates
    if run.updater.health.skipped_updates:
        values["skipped_updates"] = run.updater.health.skipped_updates
    if run.strategy.loss_scale.dynamic:
        values["loss_scale"] = run.strategy.loss_scale.value
    if lost := run.stream.bad_samples.num_samples():
        values["data/skipped_samples"] = lost
    if means and run.updater.perceptual is not None and run.updater.perceptual.weight.active(step):
        values["lpl/weight"] = run.updater.perceptual.weight.value(step)
        values["lpl/weighted_share"] = 1 - means["loss/diffusion"] / means["loss/total"]
    return values


def speed(run: Run, before: int, done: int, seconds: dict[str, float]) -> dict[str, float]:
    """Of the updates since the last log line: seconds of each by phase, samples a second,
    arithmetic of one device.
    """
    updates, perceptual = done - before, run.updater.perceptual
    with_lpl = (
        0
        if perceptual is None
        else sum(perceptual.weight.active(step) for step in range(before, done))
    )
    return {
        **peak_memory(run.device),
        "samples_per_s": updates * run.config.batch.global_batch_size / seconds["all"],
        **run.effort.rates(seconds["all"], updates=updates, with_lpl=with_lpl),
        **{f"seconds/{name}": total / updates for name, total in seconds.items()},
    }
