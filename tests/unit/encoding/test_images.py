"""From bytes to pixels of the wanted shape."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lpl_pretrain.encoding.images import decode_picture, to_square
from tests.support.material import encoded, picture


@pytest.mark.parametrize(
    ("pixels", "wanted"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("L", (2, 2), 7), (7, 7, 7)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("RGB", (2, 2), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE), (1, 2, 3)),
        (Image.fromarray(np.full((2, 2), 32896, dtype=np.uint16)), (128, 128, 128)),
    ],
)
def test_modes(pixels: Image.Image, wanted: tuple[int, int, int]) -> None:
    assert decode_picture(encoded(pixels), "x.png").tolist() == [[list(wanted)] * 2] * 2


def test_transparent_palette_is_white() -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([9, 9, 9, 8, 8, 8])
    assert (decode_picture(encoded(image, transparency=0), "x.png") == 255).all()


def test_cmyk() -> None:
    pixels = decode_picture(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), "x.jpg")
    assert np.abs(pixels[0, 0].astype(int) - (255, 0, 0)).max() <= 3


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
    pixels = np.zeros((2, 4, 3), dtype=np.uint8)
    pixels[:, :2] = 255
    shown = decode_picture(encoded(pixels, exif=exif), "x.png")
    assert shown.shape == (4, 2, 3) and (shown[:2] == 255).all() and (shown[2:] == 0).all()


def test_square_keeps_pixels_of_the_right_size() -> None:
    assert np.array_equal(to_square(picture(0, 16, 16), 16), picture(0, 16, 16))
    assert np.array_equal(to_square(picture(0, 16, 21), 16), picture(0, 16, 21)[:, 2:18])


@pytest.mark.parametrize("size", [(64, 64), (64, 80), (81, 64), (9, 13)])
def test_square_equals_resize_then_crop(size: tuple[int, int]) -> None:
    yy, xx = np.mgrid[: size[0], : size[1]]
    smooth = np.stack([yy * 3, xx * 3, (yy + xx)], axis=-1).clip(0, 255).astype(np.uint8)
    scale = 16 / min(size)
    whole = np.asarray(Image.fromarray(smooth).resize((round(size[1] * scale), round(size[0] * scale)), Image.Resampling.LANCZOS))
    top, left = (whole.shape[0] - 16) // 2, (whole.shape[1] - 16) // 2
    assert np.abs(to_square(smooth, 16).astype(int) - whole[top : top + 16, left : left + 16]).max() <= 7


def test_square_antialiases() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(to_square(stripes, 16)[:, 2:-2].astype(int) - 127).max() <= 2
