"""Decodes PNG, JPEG and WebP files to sRGB pixels: orientation, colour profile, transparency.

Pixels are uint8 (H_px, W_px, 3).
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageChops, ImageOps

from lpl_pretrain.encoding.colour import to_srgb
from lpl_pretrain.errors import DataError

MAX_PIXELS = 64_000_000
PIXELS_VERSION = 2
"""Version of the conversion from bytes to pixels: 2 converts colour profiles to sRGB, and handles
every kind of transparency.

Part of an encode's plan: a version does not finish a folder that another one began.
"""
_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP")
_PNG_BITS = 24
"""Position in a PNG file of the number of bits per channel."""


def decode_image(encoded: bytes, origin: str) -> np.ndarray:
    """uint8 (H_px, W_px, 3) in sRGB: the first frame, EXIF orientation applied, transparency
    composited on white.

    `origin` names the image in errors.  Checks the size before decoding.  Raises DataError.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=_PILLOW_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            if not image.width * image.height:
                raise ValueError(f"{image.width}x{image.height} pixels")
            bits = encoded[_PNG_BITS] if image.format == "PNG" else 8
            return _to_rgb(image, bits, origin)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{origin}: too large ({error}), wanted at most {MAX_PIXELS:,} pixels: shrink or "
            "remove it"
        ) from None
    # decoders meet arbitrary bytes and raise OSError, SyntaxError, struct.error, EOFError ...
    except Exception as error:
        raise DataError(
            f"{origin}: not a readable image ({error}): replace or remove it"
        ) from error


def _to_rgb(image: Image.Image, bits: int, origin: str) -> np.ndarray:
    """uint8 (H_px, W_px, 3); `bits`: bits per channel in the file."""
    profile = image.info.get("icc_profile")
    transparency = image.info.get("transparency")
    is_adobe = "adobe" in image.info
    colour, alpha = _colour_and_alpha(ImageOps.exif_transpose(image), transparency, bits)
    if colour.mode == "CMYK" and not is_adobe:
        # Pillow takes every CMYK JPEG for one by Adobe, whose inks are inverted
        colour = ImageChops.invert(colour)
    colour = to_srgb(colour, profile, origin).convert("RGB")
    if alpha is not None:
        colour.putalpha(alpha)
        white = Image.new("RGBA", colour.size, "white")
        colour = Image.alpha_composite(white, colour).convert("RGB")
    return np.asarray(colour)


def _colour_and_alpha(
    image: Image.Image, transparency: int | bytes | tuple[int, ...] | None, bits: int
) -> tuple[Image.Image, Image.Image | None]:
    """(L, RGB or CMYK image with 8 bits; alpha as L, or None without transparency)"""
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips it instead of scaling
        samples = np.asarray(image).astype(np.int64)
        grey = Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8))
        return grey, _opaque(samples != transparency) if isinstance(transparency, int) else None
    if image.mode in ("1", "L"):
        grey = image.convert("L")
        if not isinstance(transparency, int):
            return grey, None
        if image.mode == "1":
            level = 255 if transparency else 0
        else:
            white_level = 2**bits - 1
            level = (transparency & white_level) * 255 // white_level
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
    """(H_px, W_px) bool -> alpha channel, opaque where True."""
    return Image.fromarray(mask.astype(np.uint8) * 255)
