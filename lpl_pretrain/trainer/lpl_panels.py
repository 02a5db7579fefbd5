"""What LPL compared last, for people: the picture, the model's one-step estimate of it, and where
each stage sees them differ.

One row a sample, from little noise to much; a column for x0, x0_hat and every stage.  A stage's
maps share a scale, black to white. Not collective: rank 0 draws what its last microbatch held.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.models.autoencoder import LatentScaling, load_autoencoder
from lpl_pretrain.runtime.atomic import atomic_write
from lpl_pretrain.trainer.step import LPLSnapshot, Perceptual

MOST_ROWS = 4
CELL_PX, GAP_PX, LEFT_PX, TOP_PX, FONT_PX = 160, 4, 72, 22, 14
BRIGHTEST = 0.995
"""Quantile of a stage's errors that is shown white."""


@torch.no_grad()
def save_lpl_panels(
    config: TrainConfig, perceptual: Perceptual, scaling: LatentScaling, path: Path
) -> None:
    """Writes a PNG to `path`; nothing when no sample has been inside the gate yet.  Loads the whole
    autoencoder for a moment.
    """
    rows = choose_rows(perceptual.seen)
    if not rows:
        return
    z0, z0_hat, noise_level = (
        perceptual.seen.z0,
        perceptual.seen.z0_hat,
        perceptual.seen.noise_level,
    )
    assert z0 is not None and z0_hat is not None and noise_level is not None
    autoencoder = load_autoencoder(config.autoencoder).to(z0.device)
    columns: dict[str, list[np.ndarray]] = {"x0": [], "x0_hat": []}
    for row in rows:
        for name, z in (("x0", z0), ("x0_hat", z0_hat)):
            columns[name].append(
                pixels(autoencoder.decode(scaling.denormalize(z[row : row + 1].float())))
            )
    maps = [perceptual.loss.error_maps(z0[row : row + 1], z0_hat[row : row + 1]) for row in rows]
    for name in maps[0]:
        columns[name] = heat([one[name][0] for one in maps])
    labels = [f"SNR {noise_level[row].item() ** -2:.3g}" for row in rows]
    with atomic_write(path) as temporary:
        sheet(columns, labels).save(temporary, format="PNG", optimize=True)


def choose_rows(seen: LPLSnapshot) -> list[int]:
    """Of the samples that LPL counted, up to MOST_ROWS spread over their noise levels, ascending."""
    if seen.weights is None or seen.noise_level is None:
        return []
    counted = (seen.weights > 0).nonzero()[:, 0]
    ordered = counted[seen.noise_level[counted].argsort()].tolist()
    if len(ordered) <= MOST_ROWS:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]


def pixels(images: Tensor) -> np.ndarray:
    """(1, 3, H_px, W_px) about [-1, 1] -> uint8 (H_px, W_px, 3)."""
    return images[0].clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def heat(maps: list[Tensor]) -> list[np.ndarray]:
    """(H, W) errors -> uint8 (H, W, 3): black, red, yellow, white on one scale for all."""
    values = np.stack([one.double().cpu().numpy() for one in maps])
    level = values / max(float(np.quantile(values, BRIGHTEST)), 1e-12)
    colours = np.clip(3 * level[..., None] - np.arange(3), 0, 1)
    return list((255 * colours).round().astype(np.uint8))


def sheet(columns: dict[str, list[np.ndarray]], labels: list[str]) -> Image.Image:
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
