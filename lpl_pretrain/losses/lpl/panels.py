"""Panels of the samples LPL compared last: the image, the model's one-step estimate of it, and a
heat map of the difference at each decoder stage.

One row per sample, from little noise to much; one column each for x0, x0_hat and every stage.  The
maps of a stage share one scale, black to white.  Not collective: rank 0 draws samples of its last
microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lpl_pretrain.losses.lpl.loss import LatentPerceptualLoss
from lpl_pretrain.models.autoencoder import LatentScaling, load_autoencoder

MAX_ROWS = 4
CELL_PX, GAP_PX, LEFT_PX, TOP_PX, FONT_PX = 160, 4, 72, 22, 14
WHITE_QUANTILE = 0.995
"""Quantile of a stage's errors that is drawn white."""


@dataclass(slots=True)
class LPLSnapshot:
    """Samples that LPL compared last on this rank; empty before the first."""

    z0: Tensor | None = None
    """(K, C, H, W)"""
    z0_hat: Tensor | None = None
    """(K, C, H, W)"""
    noise_level: Tensor | None = None
    """(K,) sigma_t / alpha_t"""
    weights: Tensor | None = None
    """(K,) 0 where the gate was shut"""


@torch.no_grad()
def draw_panels(
    loss: LatentPerceptualLoss, snapshot: LPLSnapshot, autoencoder: str, scaling: LatentScaling
) -> Image.Image | None:
    """Draw the panels of a snapshot; None when no sample has been inside the gate yet.

    Loads the whole `autoencoder` for a moment.  Raises ConfigError where it cannot be read.
    """
    rows = choose_rows(snapshot)
    if not rows:
        return None
    z0, z0_hat, noise_level = snapshot.z0, snapshot.z0_hat, snapshot.noise_level
    assert z0 is not None and z0_hat is not None and noise_level is not None
    decoder = load_autoencoder(autoencoder).to(z0.device)
    columns: dict[str, list[np.ndarray]] = {"x0": [], "x0_hat": []}
    for row in rows:
        for name, z in (("x0", z0), ("x0_hat", z0_hat)):
            image = decoder.decode(scaling.denormalize(z[row : row + 1].float()))
            columns[name].append(pixels(image))
    maps = [loss.error_maps(z0[row : row + 1], z0_hat[row : row + 1]) for row in rows]
    for name in maps[0]:
        columns[name] = heatmap([one[name][0] for one in maps])
    labels = [f"SNR {noise_level[row].item() ** -2:.3g}" for row in rows]
    return panel_grid(columns, labels)


def choose_rows(snapshot: LPLSnapshot) -> list[int]:
    """Up to MAX_ROWS of the samples that LPL counted, spread over their noise levels, ascending."""
    if snapshot.weights is None or snapshot.noise_level is None:
        return []
    counted = (snapshot.weights > 0).nonzero()[:, 0]
    ordered = counted[snapshot.noise_level[counted].argsort()].tolist()
    if len(ordered) <= MAX_ROWS:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (MAX_ROWS - 1))] for i in range(MAX_ROWS)]


def pixels(images: Tensor) -> np.ndarray:
    """(1, 3, H_px, W_px) about [-1, 1] -> uint8 (H_px, W_px, 3)."""
    return images[0].clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def heatmap(maps: list[Tensor]) -> list[np.ndarray]:
    """(H, W) errors -> uint8 (H, W, 3): black, red, yellow, white on one scale for all."""
    values = np.stack([one.double().cpu().numpy() for one in maps])
    level = values / max(float(np.quantile(values, WHITE_QUANTILE)), 1e-12)
    colours = np.clip(3 * level[..., None] - np.arange(3), 0, 1)
    return list((255 * colours).round().astype(np.uint8))


def panel_grid(columns: dict[str, list[np.ndarray]], labels: list[str]) -> Image.Image:
    step = CELL_PX + GAP_PX
    canvas = Image.new("RGB", (LEFT_PX + len(columns) * step, TOP_PX + len(labels) * step), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT_PX)
    for row, label in enumerate(labels):
        draw.text(
            (4, TOP_PX + row * step + CELL_PX // 2), label, fill="black", font=font, anchor="lm"
        )
    for column, (name, cells) in enumerate(columns.items()):
        left = LEFT_PX + column * step
        draw.text((left + CELL_PX // 2, TOP_PX // 2), name, fill="black", font=font, anchor="mm")
        for row, cell in enumerate(cells):
            kind = Image.Resampling.LANCZOS if cell.shape[0] > CELL_PX else Image.Resampling.NEAREST
            canvas.paste(
                Image.fromarray(cell).resize((CELL_PX, CELL_PX), kind), (left, TOP_PX + row * step)
            )
    return canvas
