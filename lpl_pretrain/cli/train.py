"""`lpl-pretrain train`: everything that can be refused without torch is refused first; then train or go on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NoReturn

from lpl_pretrain.config.evaluation import check_protocol, check_sampler
from lpl_pretrain.config.load import dump, load_config
from lpl_pretrain.config.mix import DataFolders, read_data
from lpl_pretrain.config.notes import start_notes
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import Precision, TrainConfig
from lpl_pretrain.config.start import check_start
from lpl_pretrain.errors import CheckpointError, LPLError
from lpl_pretrain.runtime.files import published
from lpl_pretrain.runtime.lease import STALE_S, Lease, holder_of
from lpl_pretrain.runtime.preempt import StopRequest
from lpl_pretrain.runtime.world import World


def run(config_path: str, overrides: Sequence[str]) -> NoReturn:
    """Ends the process: what engines leave running would otherwise abort it."""
    stop = StopRequest().listen()
    config = load_config(TrainConfig, config_path, overrides)
    run_dir = RunDir(Path(config.run_dir or f"runs/{config.name}"))
    world = World.from_environment()
    try:
        data, protocol = accepted(config, run_dir, world)
        from lpl_pretrain.models.build import check_model_runs  # torch: only for what is accepted without

        check_model_runs(config, data.merged)
    except LPLError as refusal:
        if world.world_size > 1 and config.preflight is not None:  # another node may accept it
            from lpl_pretrain.preflight.start import refuse

            refuse(config, run_dir, world, refusal)
        raise

    from lpl_pretrain.parallel.build import needs_group
    from lpl_pretrain.preflight.start import start
    from lpl_pretrain.runtime import dist
    from lpl_pretrain.runtime.device import bf16_is_native
    from lpl_pretrain.runtime.log import log, set_up_logging
    from lpl_pretrain.trainer import provenance
    from lpl_pretrain.trainer.loop import train

    device = start(config, run_dir, world, data, partial(dist.start, world, group=needs_group(config.parallel)))
    set_up_logging(world.rank, run_dir.log(world.rank))
    lease = hold(run_dir, world)
    if world.rank == 0:
        with published(run_dir.config) as temporary:
            temporary.write_text(dump(config))
        provenance.write_once(run_dir.provenance, provenance.describe(data.merged, world.world_size, str(device)))
    if uses_bf16(config) and not bf16_is_native(device):
        log.warning(
            "bf16 is emulated on this %s, far slower than float32: add parallel.precision=fp32 lpl.decoder_precision=fp32",
            device.type,
        )
    for note in start_notes(config, data.merged) if world.rank == 0 else []:
        log.warning(note)
    score = None
    if protocol is not None:
        from lpl_pretrain.evaluation.job import evaluate

        score = partial(evaluate, run_dir, protocol, device, None, world)
    with lease or nullcontext():
        complete = train(config, run_dir, world, device, stop, score, lease.check if lease else lambda: None)
    log.info("%s: %s", run_dir.path, "complete" if complete else "stopped early")
    dist.leave()


def accepted(config: TrainConfig, run_dir: RunDir, world: World) -> tuple[DataFolders, EvaluateConfig | None]:
    """What a run needs, as far as this rank sees it without torch: its data, and the protocol that scores it inline."""
    data = read_data(config.data.folder)
    check_start(config, run_dir, data.merged, world.world_size)
    return data, inline_protocol(config)


def hold(run_dir: RunDir, world: World) -> Lease | None:
    """Communicates. Rank 0's lease on the run: two trainings of one run would overwrite each other.  Raises CheckpointError.

    A process that has lost it ends.
    """
    from lpl_pretrain.runtime.dist import first_over_ranks

    if world.rank:
        lease, trouble = None, None
    else:
        lease = Lease(run_dir.live, job=world.scheduler_job(), on_loss=partial(give_way, run_dir))
        trouble = None
        try:
            if not lease.take():
                trouble = (
                    f"{run_dir.path}: is being trained by {holder_of(run_dir.live)}: wait for its end, or give this one "
                    f"another run_dir; if that process is gone, {run_dir.live} is nobody's in {STALE_S:.0f} s"
                )
        except CheckpointError as error:
            trouble = str(error)
    if (trouble := first_over_ranks(trouble)) is not None:
        raise CheckpointError(trouble)
    return lease


def give_way(run_dir: RunDir) -> NoReturn:
    """The run goes on elsewhere. At once: this process's other threads may wait for ranks that are no more."""
    from lpl_pretrain.runtime.log import log

    log.error("%s: is being trained by another process now: this one, which was cut off or suspended, ends", run_dir.path)
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
