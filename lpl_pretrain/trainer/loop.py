"""The training loop: resume, update, average, log, save, stop when asked, in words.

Steps are counted as updates applied: after the first update `step` is 1.  A checkpoint named after a step holds the state
after that many updates.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import CheckpointError
from lpl_pretrain.runtime.dist import any_over_ranks
from lpl_pretrain.runtime.log import log, progress
from lpl_pretrain.runtime.preempt import StopRequest
from lpl_pretrain.runtime.timer import DeviceTimer
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import Run, assemble
from lpl_pretrain.trainer.lr import learning_rate
from lpl_pretrain.trainer.metrics import Meter
from lpl_pretrain.trainer.pictures import picture_lpl
from lpl_pretrain.trainer.sinks import Sinks


def train(config: TrainConfig, run_dir: RunDir, world: World, device: torch.device, stop: StopRequest) -> bool:
    """Collective. Trains until `config.steps` or until a rank is asked to stop; True when the run is complete."""
    run = assemble(config, run_dir, world, device)
    sinks = Sinks(run_dir, config, world.rank)
    try:
        first_step = restore(run, sinks)
        return loop(run, sinks, first_step, stop)
    finally:
        sinks.close()


def restore(run: Run, sinks: Sinks) -> int:
    """Collective. Loads the newest complete checkpoint, if there is one; returns the number of updates it holds."""
    state = run.checkpoints.restore_latest(run.strategy, run.ema)
    if state is None:
        return 0
    seen, now = state["stream"], run.stream.index.fingerprint
    if seen["fingerprint"] != now:
        raise CheckpointError(
            f"{run.run_dir.checkpoints}: trained on data {seen['fingerprint'][:12]}, but data.folder="
            f"{run.config.data.folder} is {now[:12]}: name the folder it was trained on"
        )
    if run.updater.perceptual is not None:
        run.updater.perceptual.weight.load_state(state["lpl_weight"])
    sinks.event("resumed", state["step"], world_size=run.world.world_size)
    log.info("resumed at step %d of %d", state["step"], run.config.steps)
    return state["step"]


def loop(run: Run, sinks: Sinks, first_step: int, stop: StopRequest) -> bool:
    """Collective. The loop itself; True when all steps are done."""
    config, meter, clock = run.config, Meter(run.device), Clock(run.config.batch.global_batch_size, timers(run))
    batches = run.stream.prefetch(run.requests(first_step), run.device)
    bar = progress(config.steps, "step", config.name, initial=first_step) if run.world.rank == 0 else None
    for step in range(first_step, config.steps):
        with clock.phase("data"):
            microbatches = list(islice(batches, run.grad_accum_steps))
        with clock.phase("update"):
            report, frozen = run.updater.update(step, run.hands(step), microbatches, meter)
            run.ema.update(done := step + 1)
        if frozen and run.updater.perceptual is not None:
            sinks.event("lpl_weight_calibrated", done, weight=run.updater.perceptual.weight.frozen)
        if done % config.log.every_steps == 0 or done == config.steps:
            means = meter.flush()
            sinks.metrics(done, {**means, **settings(run, step, means), "grad_norm": report.grad_norm, **clock.flush()})
            if bar is not None:
                bar.set_postfix({"loss": f"{means['loss/total']:.4f}"}, refresh=False)
        stopping = any_over_ranks(bool(stop))
        if stopping or done % config.checkpoint.every_steps == 0 or done == config.steps:
            with clock.phase("checkpoint"):
                run.checkpoints.save(done, run.strategy, run.ema, run.state(done))
            if run.world.rank == 0 and run.updater.perceptual is not None:
                with clock.phase("pictures"):
                    picture_lpl(run.config, run.updater.perceptual, run.updater.scaling, run.run_dir.lpl_picture(done))
        if config.ema.snapshot_every_steps and done % config.ema.snapshot_every_steps == 0:
            with clock.phase("checkpoint"):
                run.checkpoints.save_snapshot(done, run.strategy, run.ema, run.state(done))
        if bar is not None:
            bar.update(1)
        if stopping and done < config.steps:
            batches.close()
            sinks.event("stopped", done, signal=stop.signal_name)
            log.info("%s: stopped after step %d of %d; the same command goes on from there", stop.signal_name, done, config.steps)
            return False
    if bar is not None:
        bar.close()
    return True


def settings(run: Run, step: int, means: dict[str, float]) -> dict[str, float]:
    """What was in force in update number `step` (from 0), beside what was measured."""
    values = {
        "lr": learning_rate(run.config.optimizer, step, run.config.steps),
        "samples_seen": (step + 1) * run.config.batch.global_batch_size,
    }
    if lost := run.stream.damage.lost_samples():
        values["data/skipped_samples"] = lost
    if run.updater.perceptual is not None and run.updater.perceptual.weight.active(step):
        values["lpl/weight"] = run.updater.perceptual.weight.value(step)
        values["lpl/weighted_share"] = 1 - means["loss/diffusion"] / means["loss/total"]
    return values


def timers(run: Run) -> dict[str, DeviceTimer]:
    return {} if run.updater.perceptual is None else {"lpl": run.updater.perceptual.timer}


class Clock:
    """Seconds a step by phase (of the host) and by part (of the device), and samples per second, since the last log line."""

    def __init__(self, global_batch_size: int, parts: dict[str, DeviceTimer] | None = None) -> None:
        self.global_batch_size, self.parts = global_batch_size, parts or {}
        self.seconds: dict[str, float] = {}
        self.steps, self.started = 0, time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        entered = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - entered
        self.steps += name == "update"

    def flush(self) -> dict[str, float]:
        elapsed, steps = time.perf_counter() - self.started, self.steps
        self.seconds |= {name: seconds for name, timer in self.parts.items() if (seconds := timer.flush())}
        values = {f"seconds/{name}": total / steps for name, total in self.seconds.items()}
        self.seconds, self.steps, self.started = {}, 0, time.perf_counter()
        return {"samples_per_s": steps * self.global_batch_size / elapsed, **values}
