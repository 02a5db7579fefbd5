"""Resizing, cropping and aspect-ratio buckets.

Pixels are uint8 (H_px, W_px, 3).  No torch here: `evaluation` prepares its reference images with
this module too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True, slots=True)
class ResizeCrop:
    """A resize that covers the target shape, then a crop; (height, width) or (top, left) in
    pixels.
    """

    resized_px: tuple[int, int]
    crop_px: tuple[int, int]
    """(top, left) of the crop in the resized image."""
    shape_px: tuple[int, int]
    """Shape of the crop."""


def plan_resize_crop(
    source_px: tuple[int, int],
    shape_px: tuple[int, int],
    crop_fraction: tuple[float, float] | None = None,
) -> ResizeCrop:
    """Plans the resize and crop of an image of `source_px` to `shape_px`.

    `crop_fraction`: (row, column) of the crop in [0, 1), from the first to the last possible one;
    None: the center.
    """
    scale = max(wanted / actual for wanted, actual in zip(shape_px, source_px, strict=True))
    height = max(shape_px[0], round(source_px[0] * scale))
    width = max(shape_px[1], round(source_px[1] * scale))
    spare_rows = height - shape_px[0]
    spare_columns = width - shape_px[1]
    if crop_fraction is None:
        top = spare_rows // 2
        left = spare_columns // 2
    else:
        top = int(crop_fraction[0] * (spare_rows + 1))
        left = int(crop_fraction[1] * (spare_columns + 1))
    return ResizeCrop((height, width), (top, left), shape_px)


def resize_and_crop(pixels: np.ndarray, plan: ResizeCrop) -> np.ndarray:
    """Lanczos, antialiased; an image of the resized size is only cropped.  Computes no pixels
    outside the crop.
    """
    top, left = plan.crop_px
    height, width = plan.shape_px
    if pixels.shape[:2] == plan.resized_px:
        return pixels[top : top + height, left : left + width]
    y_scale = pixels.shape[0] / plan.resized_px[0]
    x_scale = pixels.shape[1] / plan.resized_px[1]
    box = (left * x_scale, top * y_scale, (left + width) * x_scale, (top + height) * y_scale)
    return np.asarray(
        Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box)
    )


def to_square(pixels: np.ndarray, resolution_px: int) -> np.ndarray:
    """The central square, resized to `resolution_px`."""
    source_px = (pixels.shape[0], pixels.shape[1])
    return resize_and_crop(pixels, plan_resize_crop(source_px, (resolution_px, resolution_px)))


def aspect_buckets(resolution_px: int, max_aspect: float, step_px: int) -> list[tuple[int, int]]:
    """(height, width) of every bucket: sides are multiples of `step_px`, areas as close to that of
    the square as the step allows, and not above it.
    """
    shapes = set()
    for short in range(step_px, resolution_px + 1, step_px):
        long = resolution_px**2 // short // step_px * step_px
        if long <= max_aspect * short:
            shapes |= {(short, long), (long, short)}
    return sorted(shapes)


def nearest_bucket(source_px: tuple[int, int], buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket with the nearest aspect ratio in logarithm: the one that crops least."""
    aspect = math.log(source_px[0] / source_px[1])
    return min(buckets, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - aspect), bucket))
