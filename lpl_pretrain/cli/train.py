"""`lpl-pretrain train`: check everything that needs no torch, then train or resume."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from lpl_pretrain.cli.run_folder import clean_finished_run, hold_run, record_start
from lpl_pretrain.config.data_mixture import DataFolders, read_data
from lpl_pretrain.config.evaluation import check_protocol, check_sampler
from lpl_pretrain.config.load import load_config
from lpl_pretrain.config.notes import start_notes
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.resume import check_start, finished
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import Precision, TrainConfig
from lpl_pretrain.errors import LPLError
from lpl_pretrain.runtime.command import command_line
from lpl_pretrain.runtime.preempt import (
    INTERRUPTED,
    SIGNALS,
    StopRequest,
    stop_request,
)
from lpl_pretrain.runtime.world import World


def run(config_path: str, overrides: Sequence[str]) -> None:
    """Train, and end the process, but for a run that was complete before: what engines leave
    running would otherwise abort it.
    """
    stop = listen()
    config = load_config(TrainConfig, config_path, overrides)
    run_dir = run_dir_of(config)
    world = World.from_environment()
    if (message := finished_message(config, run_dir, world)) is not None:
        if world.rank == 0:
            print(message)
        return
    complete = train_run(config, run_dir, world, stop)
    from lpl_pretrain.runtime import dist

    dist.exit(0 if complete or not stop.interrupted else INTERRUPTED)


def train(config: TrainConfig) -> RunDir:
    """Collective.  Train a run in this process, or resume it; the same as `lpl-pretrain train`.

        run = train(load_config(TrainConfig, "configs/train/emoji_dit.yaml", ["steps=100"]))

    One process trains alone; under torchrun every rank calls it.  Returns the run's folder when all
    `config.steps` are made, at once for a run that is complete.  Signals are left to the caller:
    after an interruption the same call resumes from the last checkpoint.  Where the preflight finds
    a node unfit, the process ends.

    Raises ConfigError, DataError, CheckpointError or another LPLError.  After an error the process
    group is left as it is: go on in a new process.
    """
    run_dir = run_dir_of(config)
    world = World.from_environment()
    if finished_message(config, run_dir, world) is None:
        train_run(config, run_dir, world, StopRequest())
        from lpl_pretrain.runtime import dist

        dist.shutdown()
    return run_dir


def run_dir_of(config: TrainConfig) -> RunDir:
    """Folder of a run: `run_dir`, or runs/NAME."""
    return RunDir(Path(config.run_dir or f"runs/{config.name}"))


def finished_message(config: TrainConfig, run_dir: RunDir, world: World) -> str | None:
    """Message about a run that is complete, after rank 0 has removed its leftovers; None: train."""
    reason = finished(config, run_dir)
    if reason is None:
        return None
    if world.rank == 0:
        clean_finished_run(run_dir, world)
    return f"{run_dir.path}: {reason}{unscored(config, run_dir)}"


def train_run(config: TrainConfig, run_dir: RunDir, world: World, stop: StopRequest) -> bool:
    """Collective.  Check a run, then train it; True when it is complete.  Keeps the group."""
    missing = [path for path in (run_dir.path, *run_dir.path.parents) if not path.exists()]
    try:
        data, protocol = accepted(config, run_dir, world)
        from lpl_pretrain.models.build import (
            check_model_runs,
        )  # torch: only for what is accepted without

        check_model_runs(config, data.merged)
    except LPLError as refusal:
        if world.world_size > 1 and config.preflight is not None:  # another node may accept it
            from lpl_pretrain.preflight.run import report_refusal

            report_refusal(config, run_dir, world, refusal)
        raise

    from lpl_pretrain.parallel.build import needs_process_group
    from lpl_pretrain.preflight.run import run_preflight
    from lpl_pretrain.runtime import dist
    from lpl_pretrain.runtime.device import bf16_is_native
    from lpl_pretrain.runtime.log import log, set_up_logging
    from lpl_pretrain.trainer.loop import train as train_steps

    device = run_preflight(
        config,
        run_dir,
        world,
        data,
        partial(dist.init, world, group=needs_process_group(config.parallel)),
    )
    with (
        hold_run(run_dir, world, missing) as lease,
        record_start(config, run_dir, world, data, str(device), new=bool(missing)) as begin,
    ):
        set_up_logging(world.rank, run_dir.log(world.rank))
        if uses_bf16(config) and not bf16_is_native(device):
            log.warning(
                "bf16 is emulated on this %s, far slower than float32: add parallel.precision=fp32 "
                "lpl.decoder_precision=fp32",
                device.type,
            )
        for note in start_notes(config, data.merged) if world.rank == 0 else []:
            log.warning(note)
        score = None
        if protocol is not None:
            from lpl_pretrain.evaluation.evaluator import evaluate

            score = partial(
                evaluate, run_dir, protocol, device, None, world, stopping=stop.__bool__
            )
        check_ownership = lease.check_ownership if lease else lambda: None
        complete = train_steps(config, run_dir, world, device, stop, score, check_ownership, begin)
        check_ownership()  # another process may have finished the run while this one was suspended
    if complete:
        log.info("%s: complete", run_dir.path)
    return complete


def listen() -> StopRequest:
    stop = stop_request().listen(SIGNALS)
    stop.resume_hint = "the same command goes on from there"
    if not World.scheduler_job():  # whose job goes on by itself
        stop.resume_hint += f": {command_line()}"
    stop.exit_message = (
        f"interrupted: nothing was saved now; {stop.resume_hint.replace(' from there', '')}"
    )
    return stop


def unscored(config: TrainConfig, run_dir: RunDir) -> str:
    """Words about checkpoints of a complete run that its inline evaluation has left."""
    with suppress(LPLError):
        protocol = inline_protocol(config)
        if protocol is not None and (steps := run_dir.pending_evaluations(protocol.name)):
            command = f"lpl-pretrain evaluate {run_dir.path} {config.inline_evaluation}"
            return f"; steps {', '.join(map(str, steps))} have no score: `{command}` scores them"
    return ""


def accepted(
    config: TrainConfig, run_dir: RunDir, world: World
) -> tuple[DataFolders, EvaluateConfig | None]:
    """Reads what a run needs and can be checked without torch: its data, and the protocol that
    scores it inline.
    """
    data = read_data(config.data.folder)
    check_start(config, run_dir, data.merged, world.world_size)
    return data, inline_protocol(config)


def inline_protocol(config: TrainConfig) -> EvaluateConfig | None:
    """Raises ConfigError for one that could not run at the first checkpoint."""
    if config.inline_evaluation is None:
        return None
    protocol = load_config(EvaluateConfig, config.inline_evaluation, [])
    check_protocol(protocol)
    check_sampler(config.diffusion.prediction, protocol.sampler)
    return protocol


def uses_bf16(config: TrainConfig) -> bool:
    return config.parallel.precision in (Precision.BF16, Precision.FP8) or (
        config.lpl is not None and config.lpl.decoder_precision == "bf16"
    )
