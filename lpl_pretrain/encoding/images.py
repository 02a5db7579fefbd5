"""From the bytes of a picture to RGB of the wanted shape: decoding, resizing, cropping, aspect
buckets.

Pixels are uint8 (H, W, 3).  No torch here: `evaluation` brings its reference pictures into shape
through this file too.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageOps

from lpl_pretrain.encoding.colour import to_srgb
from lpl_pretrain.errors import DataError

MAX_PIXELS = 64_000_000
PIXELS_VERSION = 2
"""Of how bytes become pixels: 2 converts colour profiles to sRGB, and knows every kind of
transparency.

Part of an encode's plan: what one version began is not finished by another.
"""
_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP")
_PNG_BITS = 24
"""Where a PNG says how many bits a sample has."""


@dataclass(frozen=True, slots=True)
class ResizeCrop:
    """How a picture comes into a shape: resized to cover it, then cropped.  All are (height, width)
    or (top, left) in pixels.
    """

    resized_px: tuple[int, int]
    crop_px: tuple[int, int]
    """Of the part that is kept, in the resized picture."""
    shape_px: tuple[int, int]


def decode_picture(encoded: bytes, origin: str) -> np.ndarray:
    """uint8 (H, W, 3) in sRGB: the first frame, EXIF orientation applied, transparency composited
    on white.

    The size is checked before decoding.  Raises DataError.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=_PILLOW_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            if not image.width * image.height:
                raise ValueError(f"{image.width}x{image.height} pixels")
            bits = encoded[_PNG_BITS] if image.format == "PNG" else 8
            return _to_rgb(image, bits, origin)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        raise DataError(
            f"{origin}: too large ({problem}), wanted at most {MAX_PIXELS:,} pixels: shrink or "
            "remove it"
        ) from None
    # decoders meet arbitrary bytes and raise OSError, SyntaxError, struct.error, EOFError ...
    except Exception as problem:
        raise DataError(
            f"{origin}: not a readable picture ({problem}): replace or remove it"
        ) from problem


def plan_fit(
    source_px: tuple[int, int], shape_px: tuple[int, int], place: tuple[float, float] | None = None
) -> ResizeCrop:
    """`place` in [0, 1) says where the crop lies between its first and last possible row and
    column; None is the centre.
    """
    scale = max(wanted / found for wanted, found in zip(shape_px, source_px, strict=True))
    resized = [
        max(wanted, round(found * scale)) for wanted, found in zip(shape_px, source_px, strict=True)
    ]
    spare = [found - wanted for found, wanted in zip(resized, shape_px, strict=True)]
    if place is None:
        top, left = spare[0] // 2, spare[1] // 2
    else:
        top, left = int(place[0] * (spare[0] + 1)), int(place[1] * (spare[1] + 1))
    return ResizeCrop((resized[0], resized[1]), (top, left), shape_px)


def apply_fit(pixels: np.ndarray, fit: ResizeCrop) -> np.ndarray:
    """Lanczos, antialiased; pixels as they are when the size is right already.  Only the part that
    is kept is computed.
    """
    (top, left), (height, width) = fit.crop_px, fit.shape_px
    if pixels.shape[:2] == fit.resized_px:
        return pixels[top : top + height, left : left + width]
    y, x = (
        found / resized for found, resized in zip(pixels.shape[:2], fit.resized_px, strict=True)
    )
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    return np.asarray(
        Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box)
    )


def to_square(pixels: np.ndarray, resolution_px: int) -> np.ndarray:
    """The central square at this size."""
    return apply_fit(
        pixels, plan_fit((pixels.shape[0], pixels.shape[1]), (resolution_px, resolution_px))
    )


def aspect_buckets(resolution_px: int, max_aspect: float, step_px: int) -> list[tuple[int, int]]:
    """(height, width) of every bucket: multiples of `step_px`, as close below the area of the
    square as the step allows.
    """
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


def _to_rgb(image: Image.Image, bits: int, origin: str) -> np.ndarray:
    """`bits`: of one sample in the file."""
    profile, transparency = image.info.get("icc_profile"), image.info.get("transparency")
    is_adobe = "adobe" in image.info
    colour, alpha = _colour_and_alpha(ImageOps.exif_transpose(image), transparency, bits)
    if colour.mode == "CMYK" and not is_adobe:
        colour = ImageChops.invert(
            colour
        )  # Pillow takes every CMYK JPEG for one by Adobe, whose inks are inverted
    colour = to_srgb(colour, profile, origin).convert("RGB")
    if alpha is not None:
        colour.putalpha(alpha)
        colour = Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert(
            "RGB"
        )
    return np.asarray(colour)


def _colour_and_alpha(
    image: Image.Image, transparency: int | bytes | tuple[int, ...] | None, bits: int
) -> tuple[Image.Image, Image.Image | None]:
    """(L, RGB or CMYK with 8 bits; L, or None for a picture without transparency)"""
    if image.mode.startswith(
        "I"
    ):  # 16-bit grey: Pillow's own conversion clips it instead of scaling
        samples = np.asarray(image).astype(np.int64)
        grey = Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8))
        return grey, _opaque(samples != transparency) if isinstance(transparency, int) else None
    if image.mode in ("1", "L"):
        grey = image.convert("L")
        if not isinstance(transparency, int):
            return grey, None
        largest = 2**bits - 1
        level = (
            (255 if transparency else 0)
            if image.mode == "1"
            else (transparency & largest) * 255 // largest
        )
        return grey, _opaque(np.asarray(grey) != level)
    if image.mode == "RGB" and isinstance(transparency, tuple):
        if bits > 8:
            raise ValueError(
                "a transparent colour of 16 bits a channel: use an alpha channel, or 8 bits"
            )
        return image, _opaque((np.asarray(image) != np.array(transparency) % 256).any(axis=2))
    if image.mode in ("RGB", "CMYK"):
        return image, None
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if "A" in image.getbands() or transparency is not None:
        image = image.convert("RGBA")
        return image.convert("RGB"), image.getchannel("A")
    return image.convert("RGB"), None


def _opaque(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)
