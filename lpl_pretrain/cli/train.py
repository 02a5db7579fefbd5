"""`lpl-pretrain train`: everything that can be refused without torch is refused first; then train
or go on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lpl_pretrain.config.data_mixture import DataFolders, read_data
from lpl_pretrain.config.evaluation import check_protocol, check_sampler
from lpl_pretrain.config.load import differences, dump, load_config, load_run_config
from lpl_pretrain.config.notes import start_notes
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.resume import check_start, finished
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import Precision, TrainConfig
from lpl_pretrain.errors import CheckpointError, ConfigError, LPLError
from lpl_pretrain.runtime.atomic import atomic_write
from lpl_pretrain.runtime.command import command_line
from lpl_pretrain.runtime.lease import STALE_S, Lease, describe_holder
from lpl_pretrain.runtime.preempt import (
    INTERRUPTED,
    SIGNALS,
    Interrupted,
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
        hold(run_dir, world, missing) as lease,
        begun(config, run_dir, world, data, str(device), new=bool(missing)) as begin,
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
        check_ownership()  # a process that was suspended may find that its heir has made all steps
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


@contextmanager
def begun(
    config: TrainConfig, run_dir: RunDir, world: World, data: DataFolders, device: str, *, new: bool
) -> Iterator[Callable[[int], None]]:
    """Communicates.  Writes what a start leaves in the run's folder; gives what is to be called
    when steps begin.

    A start that is refused before that leaves what it found; `new`: the folder was not there.
    """
    from lpl_pretrain.runtime.dist import all_gather_hostnames
    from lpl_pretrain.trainer import provenance

    hosts, steps_begin = all_gather_hostnames(), False
    before = run_dir.config.read_bytes() if run_dir.config.is_file() else None
    changes = changed(config, run_dir)

    def begin(first_step: int) -> None:
        nonlocal steps_begin
        steps_begin = True
        if world.rank == 0:
            facts = provenance.describe(
                config, data.merged, step=first_step, hosts=hosts, device=device, changes=changes
            )
            provenance.append(run_dir.provenance, facts)

    try:
        if world.rank == 0:
            write(run_dir.config, dump(config).encode())
        yield begin
    except (LPLError, Interrupted):
        if world.rank == 0 and not steps_begin:
            take_back(run_dir, new, before)
        raise


def changed(config: TrainConfig, run_dir: RunDir) -> dict[str, Any]:
    """Keys that are not as in the start before; nothing where there was none."""
    with suppress(ConfigError):  # one that never made a step, and cannot be read
        return differences(load_run_config(run_dir), config) if run_dir.config.is_file() else {}
    return {}


def take_back(run_dir: RunDir, new: bool, config: bytes | None) -> None:
    """All but the lease, which is still held."""
    if new:
        for path in run_dir.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path != run_dir.live:
                path.unlink(missing_ok=True)
    elif config is None:
        run_dir.config.unlink(missing_ok=True)
    else:
        write(run_dir.config, config)


def write(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def accepted(
    config: TrainConfig, run_dir: RunDir, world: World
) -> tuple[DataFolders, EvaluateConfig | None]:
    """Reads what a run needs and can be checked without torch: its data, and the protocol that
    scores it inline.
    """
    data = read_data(config.data.folder)
    check_start(config, run_dir, data.merged, world.world_size)
    return data, inline_protocol(config)


@contextmanager
def hold(run_dir: RunDir, world: World, missing: Sequence[Path] = ()) -> Iterator[Lease | None]:
    """Communicates. Rank 0's lease on the run: two trainings of one run would overwrite each other.
    Raises CheckpointError.

    A process that has lost it ends.  Folders that were `missing`, and are empty in the end, are
    removed.
    """
    from lpl_pretrain.runtime.dist import first_error

    lease = (
        Lease(run_dir.live, job=world.scheduler_job(), on_loss=partial(give_way, run_dir))
        if world.rank == 0
        else None
    )
    try:
        trouble = None if lease is None else taken_by_another(lease, run_dir)
        if (trouble := first_error(trouble)) is not None:
            raise CheckpointError(trouble)
        yield lease
    finally:
        if lease is not None:
            lease.release()
            with suppress(OSError):
                for folder in missing:
                    folder.rmdir()


def taken_by_another(lease: Lease, run_dir: RunDir) -> str | None:
    """Takes the lease; says why that cannot be."""
    try:
        if lease.take():
            return None
    except CheckpointError as error:
        return str(error)
    return (
        f"{run_dir.path}: is being trained by {describe_holder(run_dir.live)}: wait for its end, "
        "or give "
        "this one "
        f"another run_dir; if that process is gone, {run_dir.live} is nobody's in {STALE_S:.0f} s"
    )


def clean_finished_run(run_dir: RunDir, world: World) -> None:
    """Remove the lease and half-removed checkpoints of a process that was killed after the last
    checkpoint.
    """
    if run_dir.live.exists() or run_dir.interrupted():
        with suppress(CheckpointError), Lease(run_dir.live, job=world.scheduler_job()) as lease:
            for folder in run_dir.interrupted() if lease.held else []:
                shutil.rmtree(folder, ignore_errors=True)


def give_way(run_dir: RunDir) -> NoReturn:
    """The run goes on elsewhere. At once: this process's other threads may wait for ranks that are
    no more.
    """
    from lpl_pretrain.runtime.log import log

    log.error(
        "%s: is being trained by another process now: this one, which was cut off or "
        "suspended, ends",
        run_dir.path,
    )
    os._exit(1)


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
