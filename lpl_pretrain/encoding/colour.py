"""Colour profiles: pixels of any ICC profile to sRGB, which is what the encoders expect.

A profile that cannot be used (broken, or of another colour space than the picture) is ignored, as
browsers do, with a warning.  A profile that is sRGB in all but name changes no pixel.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from lpl_pretrain.runtime.log import log

SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
"""Pillow's mode -> the colour space that a profile names."""
MAX_PROFILE_BYTES = 16 << 20
SAME_LEVELS = 2
"""A profile that moves no colour by more levels of 255 than this is sRGB: profiles of it differ in
their rounding.
"""
_warned: set[tuple[str, int]] = set()


def to_srgb(image: Image.Image, profile: bytes | None, origin: str) -> Image.Image:
    """`image` of mode RGB, L or CMYK without alpha; perceptual intent.  `origin` names the picture
    in warnings.
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
    """(None, None): nothing to do.  (None, reason): the profile cannot be used."""
    if len(profile) > MAX_PROFILE_BYTES:
        return None, f"it has {len(profile)} bytes"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space != SPACES[mode]:
            return None, f"it is for {space} and the picture is {SPACES[mode]}"
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
    except Exception as problem:  # the decoder of profiles meets arbitrary bytes
        return None, f"it cannot be read: {problem}"
    return (None if _is_srgb(transform, mode) else transform), None


def _is_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a lattice of colours stays where it is."""
    if mode == "CMYK":
        return False
    if mode == "L":
        colours = np.arange(256, dtype=np.uint8)[None]
        wanted = np.repeat(colours[..., None], 3, axis=-1)
    else:
        steps = np.linspace(0, 255, 9).round().astype(np.uint8)
        wanted = colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    converted = ImageCms.applyTransform(Image.fromarray(colours), transform)
    return bool(np.abs(np.asarray(converted).astype(int) - wanted).max() <= SAME_LEVELS)
