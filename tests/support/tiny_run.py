"""A run folder without training: random checkpoints, reference images, and a cheap extractor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from lpl_pretrain.checkpoint.manifest import STATE, Manifest, write_json
from lpl_pretrain.checkpoint.store import load_full, merge_parts, write_rank
from lpl_pretrain.config.check import run_identity
from lpl_pretrain.config.dataset import INDEX_NAME
from lpl_pretrain.config.hashing import autoencoder_identity
from lpl_pretrain.config.load import dump, load_run_config
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.evaluation.extractor import Extractor
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.parallel.strategy import ParamRange
from tests.support.autoencoders import tiny_folder
from tests.support.configs import dataset_index, train_config

SIDE = 8
"""Side of a latent; images are 4 times as wide."""


@dataclass(frozen=True)
class TinyRun:
    run_dir: RunDir
    reference: Path

    def protocol(self, **changes) -> EvaluateConfig:
        settings = {
            "name": "tiny",
            "images": 10,
            "batch_size": 4,
            "sampler": {"kind": "euler", "steps": 2},
            "reference": str(self.reference),
            "guidance_scales": [1.0, 3.0],
            "grid_images": 5,
        }
        return EvaluateConfig.model_validate({**settings, **changes})


def make_run(folder: Path, prediction: str, schedule: str, **changes) -> TinyRun:
    autoencoder = tiny_folder(folder / "autoencoder")
    index = dataset_index(identity=autoencoder_identity(Path(autoencoder)), side=SIDE)
    (folder / "data").mkdir()
    (folder / "data" / INDEX_NAME).write_text(index.model_dump_json())
    changes |= {"autoencoder": autoencoder, "data__folder": str(folder / "data")}
    config = train_config(**changes, diffusion__prediction=prediction, diffusion__schedule=schedule)
    run_dir = RunDir(folder / "run")
    run_dir.path.mkdir()
    run_dir.config.write_text(dump(config))
    for step in (3, 6):
        save_checkpoint(run_dir, config, index, step)
    run_dir.checkpoint(9).mkdir()  # no manifest: never finished
    (folder / "real").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "real" / f"{i:02d}.png")
    return TinyRun(run_dir, folder / "real")


def save_checkpoint(run_dir: RunDir, config, index, step: int) -> None:
    model = build_denoiser(config.model, index.latent, len(index.classes), seed=step)
    with torch.no_grad():  # the output layer is initialised with zeros: make all parameters matter
        for parameter in model.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            )
    folder = run_dir.checkpoint(step)
    folder.mkdir(parents=True)
    named = [(name, tuple(p.shape), p.detach()) for name, p in model.named_parameters()]
    param = [("param", ParamRange(name, shape, 0, p.flatten())) for name, shape, p in named]
    ema = [("ema", ParamRange(name, shape, 0, 0.9 * p.flatten())) for name, shape, p in named]
    publish(folder, step, [*param, *ema], run_identity(config))


def save_snapshot(run_dir: RunDir, step: int) -> None:
    """Write power-function averages of two lengths that differ from each other and from `param`."""
    folder = run_dir.snapshot(step)
    pieces = []
    folder.mkdir(parents=True)
    for name, tensor in load_full(run_dir.checkpoint(step), "param").items():
        for kind, factor in (("ema_power_0.050", 0.8), ("ema_power_0.100", 0.6)):
            pieces.append(
                (kind, ParamRange(name, tuple(tensor.shape), 0, factor * tensor.flatten()))
            )
    publish(folder, step, pieces, run_identity(load_run_config(run_dir)))


def publish(folder: Path, step: int, pieces: list[tuple[str, ParamRange]], identity: str) -> None:
    """Write the files of a checkpoint of one rank."""
    write_rank(folder, 0, pieces)
    files = merge_parts(folder, 1)
    files[STATE] = write_json(folder / STATE, {"step": step})
    Manifest(step, step * 8, step, "LocalStrategy", 1, identity, files).write(folder)


class ColorMeans(nn.Module):
    """Network with 12 features: the mean of each colour channel in each quarter."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, pixels):
        return nn.functional.adaptive_avg_pool2d(pixels.float(), 2).flatten(1)


def color_means_extractor(config, device):
    return Extractor(
        config,
        "_averages",
        12,
        "0" * 64,
        "none",
        ColorMeans(),
        lambda network, pixels: {"pooled": network(pixels)},
    )
