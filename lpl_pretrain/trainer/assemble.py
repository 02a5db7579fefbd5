"""From a checked configuration to the parts of a run, each built once, in the one order that works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError

from lpl_pretrain.checkpoint.manager import CheckpointManager
from lpl_pretrain.config.check import grad_accum_steps, run_identity
from lpl_pretrain.config.data_mixture import DataFolders
from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.init_from import InitConfig
from lpl_pretrain.config.lpl import LPLConfig
from lpl_pretrain.config.online_text import stored_encoders, text_entries
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import ConditioningConfig, OnSpike, TrainConfig
from lpl_pretrain.data.null_text import read_null_text
from lpl_pretrain.data.stream import LatentStream, RequestedFields
from lpl_pretrain.diffusion.denoiser import Denoiser
from lpl_pretrain.diffusion.schedule import Schedule, make_schedule
from lpl_pretrain.ema.tracker import EMATracker
from lpl_pretrain.errors import CheckpointError, ConfigError, DataError
from lpl_pretrain.losses.lpl.features import DTYPES, DecoderFeatures
from lpl_pretrain.losses.lpl.gate import gate_share, max_noise_level
from lpl_pretrain.losses.lpl.lpl import LatentPerceptualLoss
from lpl_pretrain.losses.lpl.weight import LPLWeight
from lpl_pretrain.models.autoencoder import (
    LatentScaling,
    compose_scaling,
    latent_scaling,
    load_autoencoder,
)
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import TextConditioner
from lpl_pretrain.models.decoder import decoder_stages
from lpl_pretrain.parallel.build import make_strategy
from lpl_pretrain.parallel.strategy import Strategy
from lpl_pretrain.planning.peak import peak_flops
from lpl_pretrain.runtime import rng
from lpl_pretrain.runtime.device import device_name
from lpl_pretrain.runtime.dist import broadcast_json, first_error, sum_over_ranks
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.batch_plan import BatchPlanner, LPLSubset, MicrobatchPlan
from lpl_pretrain.trainer.init_from import load_init_from
from lpl_pretrain.trainer.mfu import FlopsPerUpdate, denoiser_flops, lpl_flops
from lpl_pretrain.trainer.nonfinite import NonFiniteGuard
from lpl_pretrain.trainer.optimizer import make_optimizer
from lpl_pretrain.trainer.spikes import NoiseLevels, SpikeGuard
from lpl_pretrain.trainer.step import LPLSnapshot, Perceptual, Updater


@dataclass(slots=True)
class Run:
    config: TrainConfig
    run_dir: RunDir
    world: World
    device: torch.device
    stream: LatentStream
    dealer: BatchPlanner
    strategy: Strategy
    updater: Updater
    ema: EMATracker
    checkpoints: CheckpointManager
    grad_accum_steps: int
    effort: FlopsPerUpdate
    jump_updates: int = 0
    """Updates whose samples were jumped over since the start (trainer/rollback.py)."""

    def hands(self, step: int) -> list[MicrobatchPlan]:
        """What this rank trains on in `step`, one hand per microbatch.

        Samples, noise levels and draws are those of position `step + jump_updates` in the order;
        the learning rate, averages and LPL's weight follow `step`.
        """
        slots = self.grad_accum_steps * self.world.world_size
        dealt = self.dealer.deal(step + self.jump_updates, slots)
        return dealt[self.world.rank :: self.world.world_size]

    def requests(self, first_step: int) -> Iterator[list[int]]:
        """Sample indices of every microbatch of this rank from `first_step` to the end, for reading
        ahead.
        """
        for step in range(first_step, self.config.steps):
            for hand in self.hands(step):
                yield hand.sample_indices

    def samples_seen(self, step: int) -> int:
        """That so many steps were made of, over all ranks; those jumped over do not count."""
        return step * self.config.batch.global_batch_size

    def state(self, step: int) -> dict:
        """What a checkpoint holds besides parameters, moments and averages: plain JSON, the same on
        every rank.
        """
        weight = self.updater.perceptual and self.updater.perceptual.weight.state()
        return {
            "step": step,
            "stream": self.stream.state(
                self.samples_seen(step), self.samples_seen(self.jump_updates)
            ),
            "lpl_weight": weight,
            "loss_scale": self.strategy.loss_scale.state(),
            "skipped_updates": self.updater.health.skipped_updates,
            "jump_updates": self.jump_updates,
            "spikes": None if self.updater.spikes is None else self.updater.spikes.state(),
        }

    def load_state(self, state: dict) -> None:
        """What `state` has returned; a version that knew no spikes has left out the last two."""
        if self.updater.perceptual is not None:
            self.updater.perceptual.weight.load_state(state["lpl_weight"])
        self.strategy.loss_scale.load_state(state["loss_scale"])
        self.updater.health.skipped_updates = state["skipped_updates"]
        self.jump_updates = state.get("jump_updates", 0)
        if self.updater.spikes is not None:
            self.updater.spikes.load_state(state.get("spikes"))


def assemble(
    config: TrainConfig,
    run_dir: RunDir,
    world: World,
    device: torch.device,
    check_ownership: Callable[[], None] = lambda: None,
) -> Run:
    """Collective.  Builds the parts of a run; strategies shard as they are built.

    `check_ownership`: see CheckpointManager.
    """
    requested = RequestedFields(
        captions=bool(config.conditioning.online_encoders),
        text=stored_encoders(config.conditioning),
    )
    stream = LatentStream(config.data, config.seed, config.batch.global_batch_size, requested)
    text = text_conditioner(config.conditioning, stream.folders, device)
    shape = None if text is None else text.shape
    if config.data.verify == "full":
        verify(stream, world)
    schedule = make_schedule(
        config.diffusion.schedule, zero_terminal_snr=config.diffusion.zero_terminal_snr
    )
    accumulation = grad_accum_steps(config, world.world_size)
    scaling = latent_scaling(config.data.scaling, stream.index).to(device)
    slots = accumulation * world.world_size
    perceptual, choice = build_perceptual(config, schedule, stream.index, scaling, slots, device)
    dealer = BatchPlanner(
        config.seed, config.batch.global_batch_size, config.diffusion.timesteps, schedule, choice
    )
    num_classes, seed = len(stream.index.classes), rng.key(config.seed, "initial_weights") >> 1
    model = build_denoiser(config.model, stream.index.latent, num_classes, seed, text=shape)
    if config.init_from is not None and not broadcast_json(run_dir.complete_checkpoints()):
        begin_with(config.init_from, model, world)
    strategy = make_strategy(config.parallel, world, device)
    blocks = model.sharded_blocks()
    denoiser = strategy.setup(
        model, blocks, lambda parameters: make_optimizer(config.optimizer, parameters, blocks)
    )
    return Run(
        config,
        run_dir,
        world,
        device,
        stream,
        dealer,
        strategy,
        updater=Updater(
            config,
            denoiser,
            num_classes,
            text,
            strategy,
            schedule,
            scaling,
            perceptual,
            NonFiniteGuard(config.optimizer, world),
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
        effort=FlopsPerUpdate(
            denoiser=config.batch.global_batch_size
            / world.world_size
            * denoiser_flops(config, stream.index, shape),
            lpl=accumulation * perceptual.prefix * perceptual.flops
            if perceptual is not None
            else 0.0,
            peak=peak_flops(device_name(device), config.parallel.precision),
        ),
    )


def build_spike_guard(
    config: TrainConfig,
    schedule: Schedule,
    stream: LatentStream,
    device: torch.device,
) -> SpikeGuard | None:
    """None where spikes are ignored."""
    if config.optimizer.on_spike is OnSpike.IGNORE:
        return None
    count = min(config.optimizer.spike.noise_levels, config.batch.global_batch_size)
    levels = NoiseLevels.of(count, config.diffusion.timesteps, schedule)
    return SpikeGuard(config.optimizer.spike, levels, device, stream.location_name)


def begin_with(init: InitConfig, model: Denoiser, world: World) -> None:
    """Communicates: rank 0 loads, because a strategy starts from its weights; its error is raised
    on all ranks.
    """
    trouble = None
    if world.rank == 0:
        try:
            load_init_from(init, model)
        except (CheckpointError, ConfigError) as error:
            trouble = str(error)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            trouble = (
                f"init_from: {init.model_dump(exclude_defaults=True)} cannot be read: "
                f"{type(error).__name__}: {error}"
            )
    trouble = first_error(trouble)
    if trouble is not None:
        raise CheckpointError(trouble)


def text_conditioner(
    conditioning: ConditioningConfig, folders: DataFolders, device: torch.device
) -> TextConditioner | None:
    """None for models that read no text.  The empty caption is that of the first folder: all were
    encoded by the same encoder.
    """
    if not conditioning.text_encoders:
        return None
    empty = read_null_text(folders.paths[0], folders.indexes[0], stored_encoders(conditioning))
    there = {
        name: {key: tensor.to(device) for key, tensor in found.items()}
        for name, found in empty.items()
    }
    online = None
    if conditioning.online_encoders:
        from lpl_pretrain.models.text import OnlineText  # imports transformers

        online = OnlineText.load(conditioning.online_encoders, device)
    return TextConditioner(
        conditioning.text_encoders, text_entries(conditioning, folders.merged.text), there, online
    )


def verify(stream: LatentStream, world: World) -> None:
    """Communicates: every rank reads its share of the shards; what one finds wrong is raised, or
    skipped, on all.
    """
    trouble, damaged = None, []
    try:
        damaged = stream.verify(rank=world.rank, world_size=world.world_size)
    except DataError as error:
        trouble = str(error)
    trouble = first_error(trouble)
    if trouble is not None:
        raise DataError(trouble)
    for rank in range(world.world_size):
        stream.bad_samples.extend(broadcast_json(damaged, source=rank))


def build_perceptual(
    config: TrainConfig,
    schedule: Schedule,
    index: DatasetIndex,
    scaling: LatentScaling,
    slots: int,
    device: torch.device,
) -> tuple[Perceptual | None, LPLSubset]:
    """(None, nobody chosen) without an `lpl` section.  Only the decoder's stages that are asked for
    stay in memory.
    """
    lpl = config.lpl
    if lpl is None:
        return None, LPLSubset(0, 0)
    threshold = max_noise_level(lpl.gate, schedule)
    share = gate_share(threshold, schedule, config.diffusion.timesteps)
    choice = LPLSubset.of(config.batch.global_batch_size, share, lpl.sample_fraction)
    features = build_features(config, lpl, index, scaling)
    flops = lpl_flops(lpl, features, index)
    if lpl.compile:
        features.compile_pieces()
    features.to(device)
    for bucket in index.buckets:
        features.check(index.latent.channels, bucket.height, bucket.width)
    loss = LatentPerceptualLoss(lpl, features, sum_over_ranks)
    prefix, inclusion = choice.prefix(slots), choice.inclusion
    return Perceptual(
        loss, LPLWeight(lpl), threshold, prefix, inclusion, flops, LPLSnapshot()
    ), choice


def build_features(
    config: TrainConfig, lpl: LPLConfig, index: DatasetIndex, scaling: LatentScaling
) -> DecoderFeatures:
    """From `lpl.decoder` where there is one: a smaller network for the same latents.  Not compiled."""
    autoencoder = load_autoencoder(lpl.decoder or config.autoencoder)
    if lpl.decoder is not None:
        scaling = compose_scaling(scaling, index.autoencoder, autoencoder)
    stages, dtype = decoder_stages(autoencoder.network), DTYPES[lpl.decoder_precision]
    return DecoderFeatures(stages, scaling, lpl.stages, dtype=dtype)
