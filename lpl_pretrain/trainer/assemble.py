"""Builds the parts of a run from a checked configuration, each once, in the order of dependency."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError

from lpl_pretrain.checkpoint.manager import CheckpointManager
from lpl_pretrain.config.check import grad_accum_steps, run_identity
from lpl_pretrain.config.data_mixture import DataFolders
from lpl_pretrain.config.init_from import InitConfig
from lpl_pretrain.config.online_text import stored_encoders, text_entries
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import ConditioningConfig, OnSpike, TrainConfig
from lpl_pretrain.data.null_text import read_null_text
from lpl_pretrain.data.stream import LatentStream, RequestedFields
from lpl_pretrain.diffusion.denoiser import Denoiser
from lpl_pretrain.diffusion.schedule import Schedule, make_schedule
from lpl_pretrain.ema.tracker import EMATracker
from lpl_pretrain.errors import CheckpointError, ConfigError, DataError
from lpl_pretrain.losses.build import build_terms
from lpl_pretrain.losses.lpl.subset import LPLSubset
from lpl_pretrain.losses.term import TermContext
from lpl_pretrain.models.autoencoder import latent_scaling
from lpl_pretrain.models.build import build_run_denoiser
from lpl_pretrain.models.conditioning import TextConditioner
from lpl_pretrain.parallel.build import make_strategy
from lpl_pretrain.parallel.strategy import Strategy
from lpl_pretrain.planning.peak import peak_flops
from lpl_pretrain.runtime import rng
from lpl_pretrain.runtime.device import device_name
from lpl_pretrain.runtime.dist import (
    broadcast_json,
    first_error,
    mean_over_ranks,
    sum_over_ranks,
)
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.batch_plan import BatchPlanner, MicrobatchPlan
from lpl_pretrain.trainer.batches import BatchReader, TrainBatch
from lpl_pretrain.trainer.init_from import load_init_from
from lpl_pretrain.trainer.mfu import FlopsPerUpdate, denoiser_flops
from lpl_pretrain.trainer.nonfinite import NonFiniteGuard
from lpl_pretrain.trainer.optimizer import make_optimizer
from lpl_pretrain.trainer.spikes import NoiseLevels, SpikeGuard
from lpl_pretrain.trainer.update import Updater


@dataclass(slots=True)
class Run:
    config: TrainConfig
    run_dir: RunDir
    world: World
    device: torch.device
    stream: LatentStream
    planner: BatchPlanner
    reader: BatchReader
    strategy: Strategy
    updater: Updater
    ema: EMATracker
    checkpoints: CheckpointManager
    grad_accum_steps: int
    flops: FlopsPerUpdate
    jump_updates: int = 0
    """Updates whose samples were jumped over since the start (trainer/rollback.py)."""

    def microbatch_plans(self, step: int) -> list[MicrobatchPlan]:
        """Plans of this rank's microbatches in update number `step` (from 0).

        Samples, noise levels and draws are those of position `step + jump_updates` in the order;
        the learning rate, averages and weights of loss terms follow `step`.
        """
        return self._plans_at(step + self.jump_updates)

    def batches(self, first_step: int) -> Generator[TrainBatch, None, None]:
        """This rank's microbatches from update `first_step` on, prefetched to the device."""
        positions = range(first_step + self.jump_updates, self.config.steps + self.jump_updates)
        return self.reader.prefetch(self._plans_at, positions, self.device)

    def samples_seen(self, step: int) -> int:
        """Training samples of `step` updates, over all ranks, without those jumped over."""
        return step * self.config.batch.global_batch_size

    def state(self, step: int) -> dict[str, Any]:
        """State for a checkpoint besides parameters, moments and averages: plain JSON, the same on
        every rank.
        """
        jumped = self.samples_seen(self.jump_updates)
        term_states = {term.name: term.state() for term in self.updater.terms}
        return {
            "step": step,
            "stream": self.stream.state(self.samples_seen(step), jumped),
            "loss_terms": {name: state for name, state in term_states.items() if state},
            "loss_scale": self.strategy.loss_scale.state(),
            "skipped_updates": self.updater.nonfinite.skipped_updates,
            "jump_updates": self.jump_updates,
            "spikes": None if self.updater.spikes is None else self.updater.spikes.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; versions that knew no spikes left out the last two."""
        for term in self.updater.terms:
            term.load_state(state["loss_terms"].get(term.name, {}))
        self.strategy.loss_scale.load_state(state["loss_scale"])
        self.updater.nonfinite.restore(state["skipped_updates"])
        self.jump_updates = state.get("jump_updates", 0)
        if self.updater.spikes is not None:
            self.updater.spikes.load_state(state.get("spikes"))

    def _plans_at(self, position: int) -> list[MicrobatchPlan]:
        world_size = self.world.world_size
        plans = self.planner.plan(position, self.grad_accum_steps * world_size)
        return plans[self.world.rank :: world_size]


def assemble(
    config: TrainConfig,
    run_dir: RunDir,
    world: World,
    device: torch.device,
    check_ownership: Callable[[], None] = lambda: None,
) -> Run:
    """Collective. Build a run; strategies shard the model as they are built.

    `check_ownership` exits the process if the run's lease was taken over.
    """
    accumulation = grad_accum_steps(config, world.world_size)
    stream = open_stream(config, world)
    text = text_conditioner(config.conditioning, stream.folders, device)
    schedule = make_schedule(
        config.diffusion.schedule, zero_terminal_snr=config.diffusion.zero_terminal_snr
    )
    scaling = latent_scaling(config.data.scaling, stream.index).to(device)
    context = TermContext(
        config,
        schedule,
        stream.index,
        scaling,
        device,
        microbatches_per_rank=accumulation,
        num_microbatches=accumulation * world.world_size,
        sum_over_ranks=sum_over_ranks,
        mean_over_ranks=mean_over_ranks,
    )
    terms = build_terms(context)
    subset = next((term.subset for term in terms if term.subset is not None), LPLSubset(0, 0))
    num_classes = len(stream.index.classes)
    seed = rng.key(config.seed, "initial_weights") >> 1
    text_shape = None if text is None else text.shape
    model = build_run_denoiser(config, stream.index, seed)
    if config.init_from is not None and not broadcast_json(run_dir.complete_checkpoints()):
        init_model(config.init_from, model, world)
    strategy = make_strategy(config.parallel, world, device)
    blocks = model.sharded_blocks()
    denoiser = strategy.setup(
        model, blocks, lambda parameters: make_optimizer(config.optimizer, parameters, blocks)
    )
    local_batch_size = config.batch.global_batch_size / world.world_size
    return Run(
        config,
        run_dir,
        world,
        device,
        stream,
        BatchPlanner(
            config.seed,
            config.batch.global_batch_size,
            config.diffusion.timesteps,
            schedule,
            subset,
        ),
        BatchReader(config, stream, subset.per_microbatch(context.num_microbatches)),
        strategy,
        updater=Updater(
            config,
            denoiser,
            num_classes,
            text,
            strategy,
            schedule,
            scaling,
            terms,
            NonFiniteGuard(config.optimizer, world, device),
            device,
            build_spike_guard(config, schedule, stream, device),
        ),
        ema=EMATracker(strategy.local_params(), config.ema),
        checkpoints=CheckpointManager(
            run_dir,
            config.checkpoint,
            run_identity(config),
            check_ownership,
            config.batch.global_batch_size,
            keep_due=config.optimizer.on_spike is OnSpike.ROLLBACK,
        ),
        grad_accum_steps=accumulation,
        flops=FlopsPerUpdate(
            local_batch_size * denoiser_flops(config, stream.index, text_shape),
            terms,
            peak_flops(device_name(device), config.parallel.precision),
        ),
    )


def open_stream(config: TrainConfig, world: World) -> LatentStream:
    """Open the latents of a run.  Collective with data.verify=full, which reads every shard."""
    requested = RequestedFields(
        captions=bool(config.conditioning.online_encoders),
        text=stored_encoders(config.conditioning),
    )
    stream = LatentStream(config.data, config.seed, config.batch.global_batch_size, requested)
    if config.data.verify == "full":
        verify(stream, world)
    return stream


def build_spike_guard(
    config: TrainConfig,
    schedule: Schedule,
    stream: LatentStream,
    device: torch.device,
) -> SpikeGuard | None:
    """Build the spike guard; None with optimizer.on_spike=ignore."""
    if config.optimizer.on_spike is OnSpike.IGNORE:
        return None
    count = min(config.optimizer.spike.noise_levels, config.batch.global_batch_size)
    levels = NoiseLevels.of(count, config.diffusion.timesteps, schedule)
    return SpikeGuard(config.optimizer.spike, levels, device, stream.location_name)


def init_model(init: InitConfig, model: Denoiser, world: World) -> None:
    """Collective. Load initial weights on rank 0, from which a strategy copies them.

    An error of rank 0 is raised on all ranks as CheckpointError.
    """
    message = None
    if world.rank == 0:
        try:
            load_init_from(init, model)
        except (CheckpointError, ConfigError) as error:
            message = str(error)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            message = (
                f"init_from: {init.model_dump(exclude_defaults=True)} cannot be read: "
                f"{type(error).__name__}: {error}"
            )
    message = first_error(message)
    if message is not None:
        raise CheckpointError(message)


def text_conditioner(
    conditioning: ConditioningConfig, folders: DataFolders, device: torch.device
) -> TextConditioner | None:
    """Build the text conditioner; None for models that read no text.

    The null text is that of the first folder: all folders used the same encoders.
    """
    if not conditioning.text_encoders:
        return None
    null_text = read_null_text(folders.paths[0], folders.indexes[0], stored_encoders(conditioning))
    null_text = {
        name: {key: tensor.to(device) for key, tensor in tensors.items()}
        for name, tensors in null_text.items()
    }
    online = None
    if conditioning.online_encoders:
        from lpl_pretrain.models.text import OnlineText  # imports transformers

        online = OnlineText.load(conditioning.online_encoders, device)
    return TextConditioner(
        conditioning.text_encoders,
        text_entries(conditioning, folders.merged.text),
        null_text,
        online,
    )


def verify(stream: LatentStream, world: World) -> None:
    """Collective. Verify the shards, divided among the ranks.

    Raises DataError on all ranks; samples that may be skipped are skipped on all ranks.
    """
    message = None
    bad_samples = []
    try:
        bad_samples = stream.verify(rank=world.rank, world_size=world.world_size)
    except DataError as error:
        message = str(error)
    message = first_error(message)
    if message is not None:
        raise DataError(message)
    for rank in range(world.world_size):
        stream.bad_samples.extend(broadcast_json(bad_samples, source=rank))
