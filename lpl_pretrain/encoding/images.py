"""From the bytes of a picture to RGB of the wanted shape: decoding, resizing, cropping, aspect buckets.

Pixels are uint8 (H, W, 3).  No torch here: `evaluation` brings its reference pictures into shape through this file too.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from lpl_pretrain.errors import DataError

MAX_PIXELS = 64_000_000
_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, slots=True)
class Fit:
    """How a picture comes into a shape: resized to cover it, then cropped.  All are (height, width) or (top, left) in pixels."""

    resized_px: tuple[int, int]
    crop_px: tuple[int, int]
    """Of the part that is kept, in the resized picture."""
    shape_px: tuple[int, int]


def decode_picture(encoded: bytes, origin: str) -> np.ndarray:
    """uint8 (H, W, 3): EXIF orientation applied, transparency composited on white.  The size is checked before decoding."""
    try:
        with Image.open(io.BytesIO(encoded), formats=_PILLOW_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        raise DataError(f"{origin}: too large ({problem}), wanted at most {MAX_PIXELS:,} pixels: shrink or remove it") from None
    except Exception as problem:  # decoders meet arbitrary bytes and raise OSError, SyntaxError, struct.error, EOFError ...
        raise DataError(f"{origin}: not a readable picture ({problem}): replace or remove it") from problem


def plan_fit(source_px: tuple[int, int], shape_px: tuple[int, int], place: tuple[float, float] | None = None) -> Fit:
    """`place` in [0, 1) says where the crop lies between its first and last possible row and column; None is the centre."""
    scale = max(wanted / found for wanted, found in zip(shape_px, source_px, strict=True))
    resized = [max(wanted, round(found * scale)) for wanted, found in zip(shape_px, source_px, strict=True)]
    spare = [found - wanted for found, wanted in zip(resized, shape_px, strict=True)]
    if place is None:
        top, left = spare[0] // 2, spare[1] // 2
    else:
        top, left = int(place[0] * (spare[0] + 1)), int(place[1] * (spare[1] + 1))
    return Fit((resized[0], resized[1]), (top, left), shape_px)


def apply_fit(pixels: np.ndarray, fit: Fit) -> np.ndarray:
    """Lanczos, antialiased; pixels as they are when the size is right already.  Only the part that is kept is computed."""
    (top, left), (height, width) = fit.crop_px, fit.shape_px
    if pixels.shape[:2] == fit.resized_px:
        return pixels[top : top + height, left : left + width]
    y, x = (found / resized for found, resized in zip(pixels.shape[:2], fit.resized_px, strict=True))
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box))


def to_square(pixels: np.ndarray, resolution_px: int) -> np.ndarray:
    """The central square at this size."""
    return apply_fit(pixels, plan_fit((pixels.shape[0], pixels.shape[1]), (resolution_px, resolution_px)))


def aspect_buckets(resolution_px: int, max_aspect: float, step_px: int) -> list[tuple[int, int]]:
    """(height, width) of every bucket: multiples of `step_px`, as close below the area of the square as the step allows."""
    shapes = set()
    for short in range(step_px, resolution_px + 1, step_px):
        long = resolution_px**2 // short // step_px * step_px
        if long <= max_aspect * short:
            shapes |= {(short, long), (long, short)}
    return sorted(shapes)


def nearest_bucket(source_px: tuple[int, int], buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest, as a factor: the one that cuts least off."""
    aspect = math.log(source_px[0] / source_px[1])
    return min(buckets, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - aspect), bucket))


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips it instead of scaling
        grey = (np.asarray(image).astype(np.int64) * 255 + 32767) // 65535
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
