"""Opens a run for generation: its configuration, data index, autoencoder, and a step's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lpl_pretrain.checkpoint.weights import POSTHOC, read_weights, reconstruct_ema
from lpl_pretrain.config.check import run_identity
from lpl_pretrain.config.data_mixture import read_data
from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.load import load_run_config
from lpl_pretrain.config.protocol import GuideConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.errors import CheckpointError, ConfigError, DataError
from lpl_pretrain.evaluation.captions import Captions, Prompts
from lpl_pretrain.evaluation.generate import Generator, draw_classes
from lpl_pretrain.models.autoencoder import latent_scaling, load_autoencoder
from lpl_pretrain.models.build import build_run_denoiser

MAX_ERROR_LENGTH = 500
"""Characters of torch's error that our own message repeats."""


@dataclass(frozen=True)
class TrainedRun:
    """A run and a generator with its denoiser; `load` fills in weights."""

    run_dir: RunDir
    config: TrainConfig
    index: DatasetIndex
    generator: Generator

    def load(self, step: int | None, weights: str) -> int:
        """Load weights of a step into the denoiser; returns the step.

        `step`: None for the newest whose checkpoint is sound.  `weights`: ema, raw, ema_power_...
        or posthoc_....  Raises CheckpointError.
        """
        return load_weights(self.generator.denoiser, self.run_dir, self.config, step, weights)

    def captions(self, seed: int, indices: Sequence[int]) -> list[str]:
        """Captions of images `indices`; names of their classes where the model reads no text."""
        if self.generator.captions is not None:
            return self.generator.captions.draw(seed, indices)[0]
        names = [*self.index.classes, ""]
        return [
            names[label] for label in draw_classes(seed, indices, self.index.class_counts).tolist()
        ]

    def sample_metadata(self, seed: int, indices: Sequence[int]) -> list[dict[str, object]]:
        """Conditions of images `indices`: index, class and, where the model reads text, caption."""
        names = [*self.index.classes, ""]
        labels = draw_classes(seed, indices, self.index.class_counts).tolist()
        metadata: list[dict[str, object]] = [
            {"index": i, "class": names[label]} for i, label in zip(indices, labels, strict=True)
        ]
        if self.generator.captions is not None:
            captions, _, _ = self.generator.captions.draw(seed, indices)
            for entry, caption in zip(metadata, captions, strict=True):
                entry["caption"] = caption
        return metadata


def load_weights(
    denoiser: nn.Module, run_dir: RunDir, config: TrainConfig, step: int | None, weights: str
) -> int:
    """Load weights of a step into any denoiser; arguments as in `TrainedRun.load`."""
    identity = run_identity(config)
    if weights.startswith(POSTHOC):
        sigma_rel = float(weights.removeprefix(POSTHOC))
        tensors, state = reconstruct_ema(run_dir, config.ema.sigma_rel, sigma_rel, step, identity)
    else:
        tensors, state = read_weights(run_dir, weights, step, identity)
    loaded_step = int(state["step"])
    try:
        denoiser.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"{run_dir.checkpoint(loaded_step)}: its {weights} weights do not fit the model in "
            f"{run_dir.config}: {str(error)[:MAX_ERROR_LENGTH]}"
        ) from None
    return loaded_step


def new_denoiser(config: TrainConfig, index: DatasetIndex) -> nn.Module:
    """Build a run's denoiser, frozen, with weights still to be loaded."""
    return build_run_denoiser(config, index).eval().requires_grad_(False)


def open_guide(
    guide: GuideConfig, config: TrainConfig, index: DatasetIndex, device: torch.device
) -> nn.Module:
    """Load the weaker denoiser that samples are guided away from.

    Raises ConfigError when it was trained for another prediction, schedule, text or data.
    """
    run_dir = RunDir(Path(guide.run))
    theirs = load_run_config(run_dir)
    ours_diffusion = config.diffusion.model_dump(mode="json")
    theirs_diffusion = theirs.diffusion.model_dump(mode="json")
    if theirs.conditioning.text_encoders != config.conditioning.text_encoders:
        raise ConfigError(
            f"guide.run={guide.run}: reads text by {theirs.conditioning.text_encoders}, this run "
            f"by {config.conditioning.text_encoders}: use a guide like this run"
        )
    for key in ("prediction", "schedule", "zero_terminal_snr"):
        if ours_diffusion[key] != theirs_diffusion[key]:
            raise ConfigError(
                f"guide.run={guide.run}: trained with diffusion.{key}={theirs_diffusion[key]}, "
                f"this run with {ours_diffusion[key]}: use a guide like this run"
            )
    if read_data(theirs.data.folder).merged.fingerprint != index.fingerprint:
        raise ConfigError(
            f"guide.run={guide.run}: trained on {theirs.data.folder}, this run on "
            f"{config.data.folder}: use a guide like this run"
        )
    denoiser = new_denoiser(theirs, index).to(device)
    load_weights(denoiser, run_dir, theirs, guide.step, guide.weights)
    return denoiser


def open_run(
    run_dir: RunDir,
    device: torch.device,
    guide: GuideConfig | None = None,
    prompts: Prompts | None = None,
) -> TrainedRun:
    """Open a run; `load` a step before generating.  Raises ConfigError or DataError."""
    config = load_run_config(run_dir)
    index = read_data(config.data.folder).merged
    autoencoder = load_autoencoder(config.autoencoder).to(device)
    if autoencoder.identity != index.autoencoder.identity:
        raise DataError(
            f"autoencoder={config.autoencoder} is {autoencoder.identity[:12]}, but "
            f"data.folder={config.data.folder} was encoded by {index.autoencoder.identity[:12]}: "
            "put the autoencoder that encoded the data back"
        )
    scaling = latent_scaling(config.data.scaling, index)

    def decode(z0: Tensor) -> Tensor:
        return autoencoder.decode(scaling.denormalize(z0))

    denoiser = new_denoiser(config, index).to(device)
    shape = (index.latent.channels, index.latent.height, index.latent.width)
    schedule = make_schedule(
        config.diffusion.schedule, zero_terminal_snr=config.diffusion.zero_terminal_snr
    )
    weak = None if guide is None else open_guide(guide, config, index, device)
    if prompts is not None and not config.conditioning.text_encoders:
        raise ConfigError(f"--prompt: {run_dir.path} was trained without text")
    captions = Captions(config, device, prompts) if config.conditioning.text_encoders else None
    generator = Generator(
        denoiser=denoiser,
        decode=decode,
        prediction=config.diffusion.prediction,
        schedule=schedule,
        latent_shape=shape,
        class_counts=index.class_counts,
        device=device,
        guide=weak,
        captions=captions,
    )
    return TrainedRun(run_dir, config, index, generator)


def pick_device() -> torch.device:
    """CUDA's current device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
