"""Converts pixels with any ICC colour profile to sRGB, which the encoders expect.

A profile that cannot be used (corrupt, or for another colour space than the image's) is ignored
with a warning, as in browsers.  A profile that equals sRGB up to rounding changes no pixel.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from lpl_pretrain.runtime.log import log

SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
"""Pillow's mode -> name of the colour space in a profile."""
MAX_PROFILE_BYTES = 16 << 20
SRGB_TOLERANCE = 2
"""A profile that changes no colour by more than this (of 255 levels) is sRGB, whose profiles differ
in rounding.
"""
_warned: set[tuple[str, int]] = set()


def to_srgb(image: Image.Image, profile: bytes | None, origin: str) -> Image.Image:
    """Converts `image`, of mode RGB, L or CMYK without alpha, with perceptual intent.

    `origin` names it in warnings.
    """
    if not profile:
        return image
    transform, reason = _transform(profile, image.mode)
    if reason and (image.mode, hash(profile)) not in _warned:
        _warned.add((image.mode, hash(profile)))
        log.warning("%s: its colour profile is ignored (%s); so are others like it", origin, reason)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str | None]:
    """(transform, reason): (None, None) for sRGB, (None, reason) for an unusable profile."""
    if len(profile) > MAX_PROFILE_BYTES:
        return None, f"it has {len(profile)} bytes"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space != SPACES[mode]:
            return None, f"it is for {space} and the image is {SPACES[mode]}"
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
    except Exception as error:  # the decoder of profiles meets arbitrary bytes
        return None, f"it cannot be read: {error}"
    return (None if _is_srgb(transform, mode) else transform), None


def _is_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the transform changes no colour of a lattice by more than SRGB_TOLERANCE."""
    if mode == "CMYK":
        return False
    if mode == "L":
        colours = np.arange(256, dtype=np.uint8)[None]
        wanted = np.repeat(colours[..., None], 3, axis=-1)
    else:
        steps = np.linspace(0, 255, 9).round().astype(np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
        wanted = colours
    converted = ImageCms.applyTransform(Image.fromarray(colours), transform)
    return bool(np.abs(np.asarray(converted).astype(int) - wanted).max() <= SRGB_TOLERANCE)
