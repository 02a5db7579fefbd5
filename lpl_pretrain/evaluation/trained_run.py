"""From a run directory to something that generates: the run's configuration, data index and
autoencoder, the weights of a step.
"""

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
from lpl_pretrain.config.online_text import text_entries
from lpl_pretrain.config.protocol import GuideConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.text_layout import text_shape
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.errors import CheckpointError, ConfigError, DataError
from lpl_pretrain.evaluation.captions import Captions, Prompts
from lpl_pretrain.evaluation.generate import Generator, draw_classes
from lpl_pretrain.models.autoencoder import latent_scaling, load_autoencoder
from lpl_pretrain.models.build import build_denoiser


@dataclass(frozen=True)
class TrainedRun:
    run_dir: RunDir
    config: TrainConfig
    index: DatasetIndex
    generator: Generator

    def load(self, step: int | None, weights: str) -> int:
        """Puts weights of a step (`ema`, `raw`, `ema_power_...`, `posthoc_...`) into the denoiser;
        returns the step.

        None is the newest step whose checkpoint is sound.  Raises CheckpointError.
        """
        return load_weights(self.generator.denoiser, self.run_dir, self.config, step, weights)

    def captions(self, seed: int, indices: Sequence[int]) -> list[str]:
        """What was written to the model; the names of classes where it reads no text."""
        if self.generator.captions is not None:
            return self.generator.captions.draw(seed, indices)[0]
        names = [*self.index.classes, ""]
        return [
            names[label] for label in draw_classes(seed, indices, self.index.class_counts).tolist()
        ]

    def sample_metadata(self, seed: int, indices: Sequence[int]) -> list[dict[str, object]]:
        """What the model was asked for in each of these pictures: index, class and, where it reads
        text, caption.
        """
        names = [*self.index.classes, ""]
        labels = draw_classes(seed, indices, self.index.class_counts).tolist()
        facts: list[dict[str, object]] = [
            {"index": i, "class": names[label]} for i, label in zip(indices, labels, strict=True)
        ]
        if self.generator.captions is not None:
            for fact, caption in zip(
                facts, self.generator.captions.draw(seed, indices)[0], strict=True
            ):
                fact["caption"] = caption
        return facts


def load_weights(
    denoiser: nn.Module, run_dir: RunDir, config: TrainConfig, step: int | None, weights: str
) -> int:
    """As `TrainedRun.load`, into any denoiser."""
    identity = run_identity(config)
    if weights.startswith(POSTHOC):
        sigma_rel = float(weights.removeprefix(POSTHOC))
        tensors, facts = reconstruct_ema(run_dir, config.ema.sigma_rel, sigma_rel, step, identity)
    else:
        tensors, facts = read_weights(run_dir, weights, step, identity)
    found = int(facts["step"])
    try:
        denoiser.load_state_dict(tensors)
    except RuntimeError as problem:
        raise CheckpointError(
            f"{run_dir.checkpoint(found)}: its {weights} weights do not fit the model in "
            f"{run_dir.config}: {str(problem)[:500]}"
        ) from None
    return found


def new_denoiser(config: TrainConfig, index: DatasetIndex) -> nn.Module:
    """With weights still to be loaded, frozen."""
    conditioning = config.conditioning
    text = (
        text_shape(conditioning.text_encoders, text_entries(conditioning, index.text))
        if conditioning.text_encoders
        else None
    )
    return (
        build_denoiser(config.model, index.latent, len(index.classes), text=text)
        .eval()
        .requires_grad_(False)
    )


def open_guide(
    guide: GuideConfig, config: TrainConfig, index: DatasetIndex, device: torch.device
) -> nn.Module:
    """The weaker denoiser, with its weights.  Raises ConfigError when it was trained for something
    else than `config`.
    """
    run_dir = RunDir(Path(guide.run))
    theirs = load_run_config(run_dir)
    asked, found = (some.diffusion.model_dump(mode="json") for some in (config, theirs))
    if theirs.conditioning.text_encoders != config.conditioning.text_encoders:
        raise ConfigError(
            f"guide.run={guide.run}: reads {theirs.conditioning.text_encoders}, this run "
            f"{config.conditioning.text_encoders}"
        )
    for key in ("prediction", "schedule", "zero_terminal_snr"):
        mine, other = asked[key], found[key]
        if mine != other:
            raise ConfigError(
                f"guide.run={guide.run}: trained with diffusion.{key}={other}, this run with "
                f"{mine}: use one like it"
            )
    if read_data(theirs.data.folder).merged.fingerprint != index.fingerprint:
        raise ConfigError(
            f"guide.run={guide.run}: trained on {theirs.data.folder}, this run on "
            f"{config.data.folder}: use one like it"
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
    """Raises ConfigError or DataError; `load` a step before generating."""
    config = load_run_config(run_dir)
    index = read_data(config.data.folder).merged
    autoencoder = load_autoencoder(config.autoencoder).to(device)
    if autoencoder.identity != index.autoencoder.identity:
        raise DataError(
            f"autoencoder={config.autoencoder} is {autoencoder.identity[:12]}, but "
            f"data.folder={config.data.folder} "
            f"was encoded by {index.autoencoder.identity[:12]}: put the autoencoder that made the "
            "data back"
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
    prediction, counts = config.diffusion.prediction, index.class_counts
    generator = Generator(
        denoiser, decode, prediction, schedule, shape, counts, device, weak, captions
    )
    return TrainedRun(run_dir, config, index, generator)


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
