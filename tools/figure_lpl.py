"""Draw docs/pictures/lpl.png: the features that LPL compares, on one emoji, and its gates.

    python tools/figure_lpl.py

No trained model is needed: the one-step estimate is the best linear one, a Wiener filter of the
noised latent with the power spectrum of the emoji latents.  It blurs details, as a denoiser does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from lpl_pretrain.config.load import resolve_path
from lpl_pretrain.config.lpl import GateConfig, LPLConfig
from lpl_pretrain.config.schema import ScheduleKind, TimestepConfig
from lpl_pretrain.diffusion.schedule import make_schedule
from lpl_pretrain.diffusion.timesteps import quantile
from lpl_pretrain.encoding.resize_crop import to_square
from lpl_pretrain.encoding.sources import list_images
from lpl_pretrain.losses.lpl.features import DecoderFeatures
from lpl_pretrain.losses.lpl.gate import gate_fraction, max_noise_level
from lpl_pretrain.losses.lpl.loss import LatentPerceptualLoss
from lpl_pretrain.losses.lpl.panels import heat, pixels
from lpl_pretrain.models.autoencoder import (
    Autoencoder,
    LatentScaling,
    decoder_stages,
    load_autoencoder,
)

SIDE_PX, NUM_TRAIN_IMAGES = 64, 400


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/lpl.png"))
    parser.add_argument("--image", type=int, default=60, help="index of the held-out image")
    parser.add_argument("--snr", type=float, default=6.0)
    args = parser.parse_args()
    autoencoder = load_autoencoder("asset:autoencoder_emoji")
    scaling, spectrum, mean = latent_statistics(autoencoder)
    z0 = scaling.normalize(latents(autoencoder, read_images("held_out", args.image + 1)[-1:]))
    noise_level = args.snr**-0.5
    noised = z0 + noise_level * torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    z0_hat = wiener(noised, noise_level, spectrum, mean)
    figure = plt.figure(figsize=(11, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 1.35))
    compare(top, autoencoder, scaling, z0, z0_hat, args.snr)
    gates(bottom)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)


def read_images(split: str, count: int) -> Tensor:
    """First `count` images of a split: (count, 3, 64, 64) in [-1, 1]."""
    loaded = []
    for image in list_images([str(resolve_path(f"asset:emoji/{split}.tar"))]):
        loaded.append(torch.from_numpy(np.array(to_square(image.load(), SIDE_PX))))
        if len(loaded) == count:
            break
    return torch.stack(loaded).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def latents(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Raw means of the posterior."""
    return torch.cat(
        [autoencoder.encode_moments(part).chunk(2, dim=1)[0] for part in images.split(50)]
    )


def latent_statistics(autoencoder: Autoencoder) -> tuple[LatentScaling, Tensor, Tensor]:
    """Channel scaling; power spectrum and mean, both (C, H, W), of the normalised latents."""
    raw = latents(autoencoder, read_images("train", NUM_TRAIN_IMAGES))
    scaling = LatentScaling(raw.mean(dim=(0, 2, 3)), 1 / raw.std(dim=(0, 2, 3)))
    z0 = scaling.normalize(raw)
    return (
        scaling,
        torch.fft.fft2(z0 - z0.mean(dim=0), norm="ortho").abs().square().mean(dim=0),
        z0.mean(dim=0),
    )


def wiener(noised: Tensor, noise_level: float, spectrum: Tensor, mean: Tensor) -> Tensor:
    """Linear estimate of z0 with least squared error from z0 + noise_level * eps."""
    filtered = torch.fft.fft2(noised - mean, norm="ortho") * spectrum / (spectrum + noise_level**2)
    return mean + torch.fft.ifft2(filtered, norm="ortho").real


@torch.no_grad()
def compare(
    figure: plt.Figure,
    autoencoder: Autoencoder,
    scaling: LatentScaling,
    z0: Tensor,
    z0_hat: Tensor,
    snr: float,
) -> None:
    """Draw clean features, predicted features and error maps in rows, stages in columns."""
    loss = LatentPerceptualLoss(
        LPLConfig(weight=1.0), DecoderFeatures(decoder_stages(autoencoder.network), scaling)
    )
    maps = loss.error_maps(z0, z0_hat)
    clean, predicted = loss.features(z0), loss.features(z0_hat)
    axes = figure.subplots(3, 1 + len(maps))
    for row, z in enumerate((z0, z0_hat)):
        show(axes[row, 0], pixels(autoencoder.decode(scaling.denormalize(z))))
    axes[2, 0].axis("off")
    axes[2, 0].text(
        0.5,
        0.5,
        "what a stage\nadds to the loss,\nby position",
        ha="center",
        va="center",
        fontsize=11,
    )
    for row, label in enumerate(
        ("clean latent $z_0$\n(no gradient)", f"one-step estimate $\\hat{{z}}_0$\n(SNR {snr:g})")
    ):
        axes[row, 0].set_ylabel(label, fontsize=11)
    for column, name in enumerate(maps, start=1):
        basis = directions(clean[name][0])
        show(axes[0, column], projected(clean[name][0], *basis))
        show(axes[1, column], projected(predicted[name][0], *basis))
        show(axes[2, column], heat([maps[name][0]])[0])
        side = clean[name].shape[-1]
        omega = loss.omega(name, side // z0.shape[-1])
        axes[0, column].set_title(
            f"{name}: {clean[name].shape[1]} x {side} x {side}\n$\\omega$ = {omega:g}", fontsize=10
        )
    axes[0, 0].set_title("image", fontsize=10)


def directions(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, three principal directions and their scales of (C, H, W) features, for colours."""
    flat = features.flatten(1)
    mean = flat.mean(dim=1, keepdim=True)
    vectors, values, _ = torch.linalg.svd(flat - mean, full_matrices=False)
    return mean, vectors[:, :3], values[:3, None] / flat.shape[1] ** 0.5


def projected(features: Tensor, mean: Tensor, vectors: Tensor, scale: Tensor) -> np.ndarray:
    values = vectors.T @ (features.flatten(1) - mean) / scale
    return (0.5 + values / 5).clamp(0, 1).view(3, *features.shape[1:]).permute(1, 2, 0).numpy()


def show(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def gates(figure: plt.Figure) -> None:
    """Draw the distribution of t and two gates, SNR >= 3 and noise level <= 3."""
    cases = {
        "flow, logit-normal t": (
            ScheduleKind.RECTIFIED_FLOW,
            TimestepConfig(distribution="logit_normal"),
        ),
        "SD schedule, uniform t": (ScheduleKind.SCALED_LINEAR, TimestepConfig()),
    }
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for axes, (title, (kind, timesteps)) in zip(figure.subplots(1, 2), cases.items(), strict=True):
        schedule, t = make_schedule(kind), quantile(timesteps, u)
        axes.hist(t.numpy(), bins=80, range=(0, 1), density=True, color="#c9ced6")
        for gate, colour in (
            (GateConfig(snr_above=3), "#2557d6"),
            (GateConfig(noise_level_below=3), "#d9622b"),
        ):
            threshold = max_noise_level(gate, schedule)
            fraction = gate_fraction(threshold, schedule, timesteps)
            name = "snr_above: 3" if gate.snr_above else "noise_level_below: 3"
            edge = quantile(timesteps, torch.tensor([fraction], dtype=torch.float64)).item()
            axes.axvline(edge, color=colour, label=f"{name}, {fraction:.0%}")
        axes.set_title(f"samples inside the gate: {title}", fontsize=10)
        axes.set_xlabel("t (0 is data, 1 is noise); samples left of the line pass the gate")
        axes.set_yticks([])
        axes.legend(fontsize=9, loc="lower center", framealpha=1.0)


if __name__ == "__main__":
    main()
